"""Second phase of mini's autoencoder: encoder and decoder together, against a critic.

Imitating the teacher with an absolute error leaves a small autoencoder soft: what it cannot place exactly it averages,
and with it goes the touch that tells one painter from another. Here it is trained end to end on pictures at the size
that mini paints at, so that the encoder puts into the latents what its own decoder can use, near the teacher's latents
but no longer bound to them. A discriminator of patches (Isola et al. 2017, hinge loss of Lim & Ye 2017) that compares
with real crops asks for *some* crisp touch where the exact one is lost, and its own features hold it to the right one
(feature matching, Larsen et al. 2016), so no pretrained network is needed. The latents handed to the decoder are spoilt
as sampled latents are, smoothed and noisy, so that it paints from those as crisply.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from lsast_engines.files import replace_file

from ..base.mini_autoencoder import MiniAutoencoder
from ..training.checkpoint import load_checkpoint, save_checkpoint
from .train_autoencoder import Crops, psnr

log = logging.getLogger("lsast.train.mini")


@dataclass(frozen=True)
class SharpeningOptions:
    """Every knob of the second phase."""

    steps: int = 8000
    """Optimiser steps in all; the last third decays the learning rates to zero."""
    encoder_steps: int = 2600
    """Steps in which the encoder learns too. Then the latent space stands, the cache can be made from it and the base
    trained in it, while the decoder, most of the work and all of the touch, goes on."""
    batch: int = 8
    crops: int = 4000
    """Crops that are cut once and kept in memory."""
    lr: float = 4e-4
    """Learning rate of encoder and decoder."""
    discriminator_lr: float = 3e-4
    warmup: int = 300
    """Steps in which the discriminator learns while nobody listens to it yet."""
    texture: float = 0.5
    """Weight of the absolute error of gradients."""
    adversarial: float = 0.03
    """Weight of the discriminator's verdict."""
    matching: float = 0.3
    """Weight of the distance of the discriminator's features."""
    anchor: float = 0.1
    """Weight of the squared distance to the latents of the first phase: scale and meaning of the channels stay."""
    smoothing: float = 0.4
    """Latents are blended with their 3x3 mean by a random part up to this."""
    jitter: float = 0.12
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


def cut_crops(crops: Crops, paths: list[Path], count: int, seed: int) -> torch.Tensor:
    """`count` random crops of `paths`, kept as [N, 3, side, side] uint8."""
    rng = np.random.default_rng([seed, 77])
    parts = [
        ((crops.batch(paths, 16, rng) + 1) * 127.5).round().to(torch.uint8)
        for _ in tqdm(range(0, count, 16), desc="cut crops")
    ]
    return torch.cat(parts)[:count]


def spoil(latents: torch.Tensor, options: SharpeningOptions, generator: torch.Generator) -> torch.Tensor:
    """Latents [B, 4, h, w] as a sampler might give them: each row smoothed and noisy by its own random amount."""
    rows = (len(latents), 1, 1, 1)
    part = options.smoothing * torch.rand(rows, generator=generator)
    noise = options.jitter * torch.rand(rows, generator=generator)
    smooth = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return latents + part * (smooth - latents) + noise * torch.randn(latents.shape, generator=generator)


@torch.no_grad()
def evaluate_sharpness(student: MiniAutoencoder, first: nn.Module, held_out: torch.Tensor) -> dict[str, float]:
    """On held-out crops [N, 3, side, side] uint8: PSNR, gradient energy relative to the crops' (1 = as crisp), and how
    far and how wide the latents are from those of the first phase's encoder."""
    images = held_out.float() / 127.5 - 1
    latents = student.encode(images)
    decoded = student.decode(latents).clamp(-1, 1)

    def energy(x: torch.Tensor) -> float:
        return (x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()).item()

    return {
        "psnr": psnr(decoded, images),
        "gradient_energy": energy(decoded) / energy(images),
        "latent_shift": (latents - first(images)).square().mean().sqrt().item(),
        "latent_std": latents.std().item(),
    }


def sharpen_autoencoder(
    student: MiniAutoencoder, crops: Crops, options: SharpeningOptions, folder: Path, resume: bool
) -> None:
    """Train `student` on, in place; checkpoint and log go to `folder`."""
    first = copy.deepcopy(student.encoder).eval().requires_grad_(False)
    student.requires_grad_(True).to(memory_format=torch.channels_last)
    weights = list(student.parameters())
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    critic = PatchDiscriminator()
    critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "base": options.lr},
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
    training = cut_crops(crops, crops.train, options.crops, options.seed)
    held_out = cut_crops(crops, crops.held_out, 96, options.seed)
    saved, running = time.monotonic(), dict.fromkeys(("absolute", "fooled", "matching", "anchor"), 0.0)
    progress = tqdm(total=options.steps, initial=step, desc="mini sharpening", unit="step")
    while step < options.steps:
        decay = min(1.0, 3 * (options.steps - step) / options.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * decay
        images = training[torch.randint(len(training), (options.batch,), generator=generator)].float() / 127.5 - 1
        if torch.rand((), generator=generator) < 0.5:
            images = images.flip(-1)
        images = images.contiguous(memory_format=torch.channels_last)
        whole = step < options.encoder_steps
        student.encoder.requires_grad_(whole)
        losses = _losses(student, first, critic, images, options, generator, listening=step >= options.warmup)
        optimizer.zero_grad(set_to_none=True)
        losses.pop("student").backward(
            inputs=weights if whole else list(student.decoder.parameters()), retain_graph=True
        )
        losses.pop("critic").backward(inputs=list(critic.parameters()))
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        running = {k: v.item() if step == 1 else 0.98 * running[k] + 0.02 * v.item() for k, v in losses.items()}
        progress.set_postfix({k: f"{v:.3f}" for k, v in running.items()}, refresh=False)
        progress.update()
        if step == options.steps or time.monotonic() - saved > options.checkpoint_seconds:
            history.append({"step": step, **running, **evaluate_sharpness(student, first, held_out)})
            log.info("%s", history[-1])
            save_checkpoint(checkpoint, modules, optimizer, {"step": step, "history": history})
            with replace_file(folder / "sharpening.log.json") as handle:
                handle.write(json.dumps({"options": asdict(options), "history": history}, indent=1).encode())
            saved = time.monotonic()
    progress.close()
    student.eval().requires_grad_(False)


def _losses(
    student: MiniAutoencoder,
    first: nn.Module,
    critic: PatchDiscriminator,
    images: torch.Tensor,
    options: SharpeningOptions,
    generator: torch.Generator,
    *,
    listening: bool,
) -> dict[str, Any]:
    """The losses of student and critic, and their parts for the log."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = student.encode(images).float()
        with torch.no_grad():
            anchor = first(images).float()
        decoded = student.decode(spoil(latents, options, generator)).float()
        real = [feature.float() for feature in critic(images)]
        fake = [feature.float() for feature in critic(decoded)]
        fake_for_critic = critic(decoded.detach())[-1].float()
    error = decoded - images
    absolute = error.abs().mean()
    texture = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    matching = sum(
        ((a - b.detach()).abs().mean() / b.detach().abs().mean() for a, b in zip(fake[:-1], real[:-1], strict=True)),
        start=torch.zeros(()),
    )
    fooled = -fake[-1].mean()
    shift = F.mse_loss(latents, anchor)
    loss = absolute + options.texture * texture + options.anchor * shift
    if listening:
        loss = loss + options.matching * matching + options.adversarial * fooled
    return {
        "student": loss,
        "critic": F.relu(1 - real[-1]).mean() + F.relu(1 + fake_for_critic).mean(),
        "absolute": absolute,
        "fooled": fooled,
        "matching": matching,
        "anchor": shift,
    }
