"""Training of mini's autoencoder by a teacher: TAESD's encoder and decoder, imitated by a smaller network.

The student decodes towards what the teacher decodes, not towards the photograph: the teacher's sharp texture is a
function of the latent, so a plain absolute error can learn it, where the photograph's would be averaged to blur.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image
from torch import nn

from lsast_engines.errors import PictureError, TrainingError
from lsast_engines.images import find_pictures, read_picture
from lsast_engines.images import psnr as picture_psnr

from ..base.mini_autoencoder import MiniAutoencoder
from ..training.device import fused
from ..training.loop import TrainingLoop, require_finite, set_learning_rate
from ..training.rng import RngStream, rng_for
from .dataset import PAINTED_SIDE, SMALLEST, fit_picture, is_held_out

log = logging.getLogger("lsast.train.mini")


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


LARGEST_SCALE = 1.5
"""Crops are enlarged at most so many times."""


class Crops:
    """Random crops of pictures at about the scale that mini paints at. Decoded pictures stay in memory.

    Args:
        side: side of a crop in pixels.
        memory: decoded pictures are kept up to this many bytes; the others are read again each time.

    Raises:
        TrainingError: no picture to train on, or none that is held out.
    """

    def __init__(self, folders: list[Path], side: int, memory: int = 2 << 30) -> None:
        paths = [path for folder in folders for path in find_pictures(folder)]
        held = [is_held_out(f"{path.parent.name}/{path.name}") for path in paths]
        self.train = [path for path, out in zip(paths, held, strict=True) if not out]
        self.held_out = [path for path, out in zip(paths, held, strict=True) if out]
        if not self.train or not self.held_out:
            raise TrainingError(
                f"found {len(paths)} pictures, {len(self.held_out)} of them held out by a hash of the name; expected "
                "some of either kind: give a hundred pictures or more"
            )
        self.side = side
        self._free = memory
        self._decoded: dict[Path, npt.NDArray[np.uint8] | None] = {}

    def batch(self, paths: list[Path], count: int, rng: np.random.Generator) -> torch.Tensor:
        """`count` crops [B, 3, side, side] in [-1, 1]; pictures that are unreadable or too small are drawn again.

        Raises:
            TrainingError: 1 000 draws gave no crop.
        """
        crops: list[npt.NDArray[np.uint8]] = []
        draws = 0
        while len(crops) < count:
            draws += 1
            if draws > 1000 and not crops:
                raise TrainingError(
                    f"found no readable picture of at least {SMALLEST} pixels a side that holds a crop of {self.side} "
                    f"among {len(paths)}; expected pictures at least that large"
                )
            rgb = self._read(paths[rng.integers(len(paths))])
            if rgb is None or min(rgb.shape[:2]) < SMALLEST:
                continue
            height, width = (min(n, 2 * min(rgb.shape[:2])) for n in rgb.shape[:2])
            # Side in pixels of the picture; only that part of it is resized. A crop enlarged more teaches blur.
            scale = min(PAINTED_SIDE * rng.uniform(0.85, 1.2) / math.sqrt(height * width), LARGEST_SCALE)
            cut = self.side / scale
            if cut > min(height, width):
                continue
            top, left = (
                (n - m) / 2 + rng.uniform(0, m - cut) for n, m in zip(rgb.shape, (height, width), strict=False)
            )
            crop = Image.fromarray(rgb).resize(
                (self.side, self.side), Image.Resampling.LANCZOS, (left, top, left + cut, top + cut)
            )
            crops.append(np.asarray(crop)[:, ::-1] if rng.random() < 0.5 else np.asarray(crop))
        stack = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return stack.contiguous(memory_format=torch.channels_last)

    def pictures(self, count: int) -> list[torch.Tensor]:
        """Up to `count` held-out pictures, evenly drawn, whole: [1, 3, H, W] in [-1, 1] at the painted scale."""
        found = [
            rgb
            for path in self.held_out[:: max(1, len(self.held_out) // count)]
            if (rgb := self._read(path)) is not None
        ]
        fitted = [fit_picture(rgb) for rgb in found[:count]]
        return [torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for rgb in fitted]

    def _read(self, path: Path) -> npt.NDArray[np.uint8] | None:
        if path in self._decoded:
            return self._decoded[path]
        try:
            rgb = read_picture(path).rgb
        except PictureError:
            rgb = None
        size = 0 if rgb is None else rgb.nbytes
        if size <= self._free:
            self._free -= size
            self._decoded[path] = rgb
        return rgb


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

    Raises:
        TrainingError: a loss that is not finite, or a checkpoint of other options.
        InterruptionError: SIGINT or SIGTERM; a checkpoint was written.
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
        set_learning_rate(optimizer, options.lr * min(1.0, (step + 1) / options.warmup) * max(0.01, cosine))
        images = crops.batch(crops.train, options.batch, np.random.default_rng([options.seed, step])).to(device)
        with torch.autocast(device.type, torch.bfloat16):
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
        value: float = loss.item()
        require_finite(value, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return value

    def measure(mean_loss: float) -> None:
        loop.history.append({"step": loop.step, "loss": mean_loss, **evaluate(student, teacher, crops)})
        loop.write_log(folder / "autoencoder.log.json")

    loop.run(train_step, measure)
    loop.save()
    student.to("cpu").eval().requires_grad_(False)
