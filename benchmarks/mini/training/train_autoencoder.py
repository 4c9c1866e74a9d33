"""Training of mini's autoencoder by a teacher: TAESD's encoder and decoder, imitated by a smaller network.

The student decodes towards what the teacher decodes, not towards the photograph: the teacher's sharp texture is a
function of the latent, so a plain absolute error can learn it, where the photograph's would be averaged to blur.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from lsast_engines.errors import TrainingError
from lsast_engines.images import psnr as picture_psnr
from lsast_train.base.base import autocast
from lsast_train.base.mini_networks import MiniAutoencoder
from lsast_train.training.loop import TrainingLoop
from lsast_train.training.rng import RngStream, rng_for
from lsast_train.training.run import fused

from .dataset import Crops


@dataclass(frozen=True)
class AutoencoderOptions:
    """Options of the autoencoder's training by a teacher."""

    steps: int = 2500
    """Optimiser steps in all; the learning rate falls along a cosine."""
    batch: int = 8
    side: int = 128
    """Side of a training crop in pixels, a multiple of 8."""
    lr: float = 1e-3
    warmup: int = 50
    jitter: float = 0.05
    """Standard deviation of noise added to the latents before decoding: sampled latents are never exact."""
    seed: int = 0
    evaluate_every: int = 500
    checkpoint_minutes: float = 5.0
    seconds: float | None = None
    """Wall time that the training may take; the learning rate falls along a cosine of it, too."""


def load_teacher(folder: Path) -> AutoencoderTiny:
    """TAESD from a diffusers folder.

    Raises:
        TrainingError: not such a folder.
    """
    if not (folder / "config.json").is_file():
        raise TrainingError(f"found no config.json in {folder}; expected TAESD as a diffusers folder (AutoencoderTiny)")
    teacher = AutoencoderTiny.from_pretrained(str(folder)).eval().requires_grad_(False)
    return teacher.to(memory_format=torch.channels_last)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (peak 2)."""
    found, expected = (images.clamp(-1, 1).float().cpu().numpy() for images in (a, b))
    return picture_psnr(found, expected, peak=2)


@torch.no_grad()
def evaluate(student: MiniAutoencoder, teacher: AutoencoderTiny, crops: Crops) -> dict[str, float]:
    """PSNR on held-out crops: student against teacher from the same latent, and both against the picture."""
    images = crops.batch(crops.held_out, 32, np.random.default_rng(99)).to(student.device)
    latents = teacher.encoder(images)
    reference = teacher.decoder(latents)
    return {
        "latent_rmse": (student.encode(images) - latents).square().mean().sqrt().item(),
        "latent_std": latents.std().item(),
        "decoder_psnr_to_teacher": psnr(student.decode(latents), reference),
        "psnr_to_picture": psnr(student.decode(student.encode(images)), images),
        "teacher_psnr_to_picture": psnr(reference, images),
    }


def train_autoencoder(
    student: MiniAutoencoder,
    teacher: AutoencoderTiny,
    crops: Crops,
    options: AutoencoderOptions,
    folder: Path,
    resume: bool,
    device: torch.device | str = "cpu",
) -> None:
    """Train `student` on `device`, in place; checkpoint and log go to `folder`. It comes back on the CPU.

    Errors are those of `TrainingLoop` and its `run`.
    """
    device = torch.device(device)
    teacher.to(device)
    student.requires_grad_(True).to(device, memory_format=torch.channels_last)
    parameters = student.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0, **fused(device))
    loop = TrainingLoop(
        *("mini autoencoder", options, folder / "autoencoder.checkpoint.safetensors"),
        *({"student": student}, optimizer),
        resume=resume,
        device=device,
    )

    def train_step(step: int) -> float:
        cosine = 0.5 * (1 + min(np.cos(np.pi * step / options.steps), np.cos(np.pi * (1 - loop.time_left))))
        lr = options.lr * min(1.0, (step + 1) / options.warmup) * max(0.01, cosine)
        images = crops.batch(crops.train, options.batch, np.random.default_rng([options.seed, step])).to(device)
        with autocast(device, "auto"):
            with torch.no_grad():
                latents = teacher.encoder(images).float()
                generator = rng_for(options.seed, RngStream.STEP, step)
                noisy = latents + options.jitter * torch.randn(latents.shape, generator=generator).to(device)
                reference = teacher.decoder(noisy).float().clamp(-1, 1)
            decoded = student.decode(noisy).float()
            encoded = student.encode(images).float()
        error = decoded - reference
        texture = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = (
            error.abs().mean() + 0.5 * texture + 0.5 * F.mse_loss(encoded, latents) + 0.5 * F.l1_loss(encoded, latents)
        )
        return loop.descend(loss, lr, clip=1.0)

    def measure(mean_loss: float) -> None:
        loop.history.append({"step": loop.step, "loss": mean_loss, **evaluate(student, teacher, crops)})
        loop.write_log(folder / "autoencoder.log.json")

    loop.run(train_step, measure)
    loop.save()
    student.to("cpu").eval().requires_grad_(False)
