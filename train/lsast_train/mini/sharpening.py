"""Second phase of mini's autoencoder: its decoder against a critic.

Imitating the teacher with an absolute error leaves a small decoder soft: what it cannot place exactly it averages.
A discriminator of patches (Isola et al. 2017, hinge loss of Lim & Ye 2017) that compares with real crops asks for
*some* crisp touch instead, and its own features hold it to the right one (feature matching, Larsen et al. 2016), so
no pretrained network is needed. The latents handed to the decoder are spoilt as sampled latents are, smoothed and
noisy, so that it paints from those as crisply. The encoder and the latent space stay as they are, so a base that was
trained in it stays valid.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from lsast_engines.files import replace_file

from ..checkpoint import load_checkpoint, save_checkpoint
from .autoencoder import MiniAutoencoder
from .autoencoder_training import Crops, psnr

log = logging.getLogger("lsast.train.mini")


@dataclass(frozen=True)
class SharpeningOptions:
    """Every knob of the second phase."""

    steps: int = 3000
    """Optimiser steps in all; the last third decays the learning rates to zero."""
    batch: int = 8
    crops: int = 4000
    """Crops that are cut and encoded by the teacher once."""
    lr: float = 3e-4
    """Learning rate of the decoder."""
    discriminator_lr: float = 3e-4
    warmup: int = 200
    """Steps in which the discriminator learns while the decoder does not yet listen to it."""
    adversarial: float = 0.04
    """Weight of the discriminator's verdict in the decoder's loss."""
    matching: float = 0.5
    """Weight of the distance of the discriminator's features."""
    smoothing: float = 0.6
    """Latents are blended with their 3x3 mean by a random part up to this."""
    jitter: float = 0.15
    """Latents get noise of a random standard deviation up to this."""
    seed: int = 0
    checkpoint_seconds: float = 300.0


class PatchDiscriminator(nn.Module):
    """Verdicts on overlapping patches of 26 pixels; returns its feature maps, verdict last."""

    def __init__(self, widths: tuple[int, int, int] = (48, 96, 128)) -> None:
        super().__init__()
        first, second, third = widths
        self.layers = nn.ModuleList(
            spectral_norm(conv)
            for conv in (
                nn.Conv2d(3, first, 4, stride=2, padding=1),
                nn.Conv2d(first, second, 4, stride=2, padding=1),
                nn.Conv2d(second, third, 3, padding=1),
                nn.Conv2d(third, 1, 3, padding=1),
            )
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Image [B, 3, H, W] → features of each layer; the last is the verdict [B, 1, H/4, W/4]."""
        features = [self.layers[0](image)]
        for layer in list(self.layers)[1:]:
            features.append(layer(F.leaky_relu(features[-1], 0.2)))
        return features


@dataclass(frozen=True)
class EncodedCrops:
    """Crops and the teacher's latents of them, kept in memory."""

    pixels: torch.Tensor
    """[N, 3, side, side] uint8."""
    latents: torch.Tensor
    """[N, 4, side/8, side/8] float16."""

    @classmethod
    def of(cls, crops: Crops, paths: list[Path], teacher: AutoencoderTiny, count: int, seed: int) -> EncodedCrops:
        """Cut `count` random crops of `paths` and encode them, 16 at a time."""
        rng = np.random.default_rng([seed, 77])
        pixels, latents = [], []
        for _ in tqdm(range(0, count, 16), desc="encode crops"):
            images = crops.batch(paths, 16, rng)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                latents.append(teacher.encoder(images).half())
            pixels.append(((images + 1) * 127.5).round().to(torch.uint8))
        return cls(torch.cat(pixels)[:count], torch.cat(latents)[:count])

    def batch(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [count, 3, side, side] in [-1, 1] and latents, mirrored half of the time."""
        index = torch.randint(len(self.pixels), (count,), generator=generator)
        images = self.pixels[index].float() / 127.5 - 1
        latents = self.latents[index].float()
        if torch.rand((), generator=generator) < 0.5:
            images, latents = images.flip(-1), latents.flip(-1)
        return images.contiguous(memory_format=torch.channels_last), latents


def spoil(latents: torch.Tensor, options: SharpeningOptions, generator: torch.Generator) -> torch.Tensor:
    """Latents [B, 4, h, w] as a sampler might give them: each row smoothed and noisy by its own random amount."""
    rows = (len(latents), 1, 1, 1)
    part = options.smoothing * torch.rand(rows, generator=generator)
    noise = options.jitter * torch.rand(rows, generator=generator)
    smooth = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return latents + part * (smooth - latents) + noise * torch.randn(latents.shape, generator=generator)


@torch.no_grad()
def evaluate_sharpness(student: MiniAutoencoder, held_out: EncodedCrops) -> dict[str, float]:
    """On held-out crops: PSNR, and gradient energy relative to the real crops' (1 = as crisp)."""
    images, latents = held_out.pixels.float() / 127.5 - 1, held_out.latents.float()
    decoded = student.decode(latents).clamp(-1, 1)

    def energy(x: torch.Tensor) -> float:
        return (x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()).item()

    return {
        "psnr_of_decoder": psnr(decoded, images),
        "gradient_energy": energy(decoded) / energy(images),
        "psnr_to_picture": psnr(student.decode(student.encode(images)), images),
    }


def sharpen_autoencoder(
    student: MiniAutoencoder,
    teacher: AutoencoderTiny,
    crops: Crops,
    options: SharpeningOptions,
    folder: Path,
    resume: bool,
) -> None:
    """Train the decoder of `student` on, in place; checkpoint and log go to `folder`."""
    student.requires_grad_(False).to(memory_format=torch.channels_last)
    decoder = student.decoder.requires_grad_(True)
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    critic = PatchDiscriminator()
    critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(decoder.parameters()), "base": options.lr},
            {"params": list(critic.parameters()), "base": options.discriminator_lr},
        ],
        betas=(0.5, 0.99),
        weight_decay=0.0,
    )
    checkpoint = folder / "sharpening.checkpoint.safetensors"
    modules: dict[str, nn.Module] = {"student": student, "critic": critic}
    step, history = 0, []
    if resume and checkpoint.exists():
        facts = load_checkpoint(checkpoint, modules, optimizer)
        step, history = facts["step"], facts["history"]
        generator.manual_seed(options.seed + step)
    training = EncodedCrops.of(crops, crops.train, teacher, options.crops, options.seed)
    held_out = EncodedCrops.of(crops, crops.held_out, teacher, 64, options.seed)
    saved, running = time.monotonic(), {"absolute": 0.0, "fooled": 0.0, "matching": 0.0}
    progress = tqdm(total=options.steps, initial=step, desc="mini decoder", unit="step")
    while step < options.steps:
        decay = min(1.0, 3 * (options.steps - step) / options.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * decay
        images, latents = training.batch(options.batch, generator)
        losses = _losses(student, critic, images, spoil(latents, options, generator), options, step)
        optimizer.zero_grad(set_to_none=True)
        losses.pop("decoder").backward(inputs=list(decoder.parameters()), retain_graph=True)
        losses.pop("critic").backward(inputs=list(critic.parameters()))
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        running = {k: v.item() if step == 1 else 0.98 * running[k] + 0.02 * v.item() for k, v in losses.items()}
        progress.set_postfix({k: f"{v:.3f}" for k, v in running.items()}, refresh=False)
        progress.update()
        if step == options.steps or time.monotonic() - saved > options.checkpoint_seconds:
            history.append({"step": step, **running, **evaluate_sharpness(student, held_out)})
            log.info("%s", history[-1])
            save_checkpoint(checkpoint, modules, optimizer, {"step": step, "history": history})
            with replace_file(folder / "sharpening.log.json") as handle:
                handle.write(json.dumps({"options": asdict(options), "history": history}, indent=1).encode())
            saved = time.monotonic()
    progress.close()
    student.eval().requires_grad_(False)


def _losses(
    student: MiniAutoencoder,
    critic: PatchDiscriminator,
    images: torch.Tensor,
    spoilt: torch.Tensor,
    options: SharpeningOptions,
    step: int,
) -> dict[str, Any]:
    """The losses of decoder and critic, and their parts for the log."""
    with torch.autocast("cpu", torch.bfloat16):
        decoded = student.decode(spoilt).float()
        real = [feature.float() for feature in critic(images)]
        fake = [feature.float() for feature in critic(decoded)]
        fake_for_critic = critic(decoded.detach())[-1].float()
    absolute = (decoded - images).abs().mean()
    matching = sum(
        ((a - b.detach()).abs().mean() / b.detach().abs().mean() for a, b in zip(fake[:-1], real[:-1], strict=True)),
        start=torch.zeros(()),
    )
    fooled = -fake[-1].mean()
    heard = options.adversarial if step >= options.warmup else 0.0
    return {
        "decoder": absolute + (options.matching if heard else 0.0) * matching + heard * fooled,
        "critic": F.relu(1 - real[-1]).mean() + F.relu(1 + fake_for_critic).mean(),
        "absolute": absolute,
        "fooled": fooled,
        "matching": matching,
    }
