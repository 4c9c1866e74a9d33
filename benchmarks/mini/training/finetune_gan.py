"""Second phase of mini's autoencoder: encoder and decoder together, against a discriminator.

An absolute error leaves a small autoencoder soft: what it cannot place exactly it averages, and with it goes the
texture that tells one painter from another. Here exact pixels count at a quarter of the size and only weakly at full
size; there the features of a classifier and a discriminator ask for plausible texture, and the discriminator's own
features keep it in its place. The decoder gets latents corrupted as a sampler's are: smoothed and noisy.

With a teacher (TAESD) the encoder only imitates the teacher's latents, which carry finer texture than a small encoder
finds by itself, and most of each batch is decoded from these, towards what the teacher decodes: that is a function of
the latents, so there is nothing to average. Without a teacher encoder and decoder learn together, and the latents stay
near those of the start.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lsast_train.base.base import autocast
from lsast_train.base.mini_networks import MiniAutoencoder
from lsast_train.finetuning.perceptual import PerceptualDistance
from lsast_train.training.loop import TrainingLoop, require_finite, set_learning_rate
from lsast_train.training.rng import RngStream, rng_for

from .dataset import Crops
from .ema import update_ema
from .train_autoencoder import psnr

log = logging.getLogger("lsast.train.mini")

LOSS_WEIGHTS = {
    "quarter": 1.0,  # absolute error at a quarter of the size
    "full": 0.15,  # absolute error at full size
    "texture": 0.4,  # `texture_loss`
    "perceptual": 0.5,  # distance of the features of EfficientNet-Lite1
    "adversarial": 0.2,  # `g_loss`
    "matching": 1.0,  # `feature_matching`
    # Squared and absolute distance to the anchor's latents: scale and meaning of the channels stay. With 0.05 the
    # encoder answers `GanOptions.noise` by larger latents.
    "anchor": 1.0,
}
"""Weights of the parts of the autoencoder's loss."""

TAUGHT = 0.75
"""With a teacher: part of the batch decoded from the teacher's latents, towards what the teacher decodes."""


class PatchDiscriminator(nn.Module):
    """Scores of overlapping patches of 26 pixels (Isola et al. 2017, section 3.2.2).

    The features have spectral normalisation (Miyato et al. 2018); the last layer has not, so that scores can reach the
    margin of the hinge loss.
    """

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = widths
        self.layers = nn.ModuleList(
            [
                spectral_norm(nn.Conv2d(3, first, 4, stride=2, padding=1)),
                spectral_norm(nn.Conv2d(first, second, 4, stride=2, padding=1)),
                spectral_norm(nn.Conv2d(second, third, 3, padding=1)),
                nn.Conv2d(third, 1, 3, padding=1),
            ]
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Image [B, 3, H, W] → features of each layer; the last are the scores [B, 1, H/4, W/4]."""
        features = [self.layers[0](image)]
        for layer in list(self.layers)[1:]:
            features.append(layer(F.leaky_relu(features[-1], 0.2)))
        return features


class MultiscaleDiscriminator(nn.Module):
    """One `PatchDiscriminator` sees the image, a second one its half (Wang et al. 2018): 26 and 52 pixels."""

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 192)) -> None:
        super().__init__()
        self.scales = nn.ModuleList(PatchDiscriminator(widths) for _ in range(2))

    def forward(self, image: torch.Tensor) -> list[list[torch.Tensor]]:
        """Image [B, 3, H, W] → the features of each scale in float32, full size first."""
        full, half = self.scales
        return [[x.float() for x in features] for features in (full(image), half(F.avg_pool2d(image, 2)))]


def d_loss(real: list[list[torch.Tensor]], fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017): max(0, 1 - D(real)) + max(0, 1 + D(fake)), mean over scales."""
    losses = [F.relu(1 - a[-1]).mean() + F.relu(1 + b[-1]).mean() for a, b in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


def g_loss(fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge loss of the generator: mean over scales of -D(fake)."""
    return torch.stack([-features[-1].mean() for features in fake]).mean()


def feature_matching(real: list[list[torch.Tensor]], fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Distance of the discriminator's features (Larsen et al. 2016): relative absolute error, summed over layers, mean
    over scales. The real features get no gradient."""
    distances = [
        (b - a.detach()).abs().mean() / a.detach().abs().mean()
        for real_scale, fake_scale in zip(real, fake, strict=True)
        for a, b in zip(real_scale[:-1], fake_scale[:-1], strict=True)
    ]
    return torch.stack(distances).sum() / len(real)


@dataclass(frozen=True)
class GanOptions:
    """Options of the second phase."""

    steps: int = 40000
    """Optimiser steps in all; the last third decays the learning rates to zero."""
    encoder_lr: float = 1e-3
    """Learning rate of the encoder."""
    encoder_part: float = 0.6
    """Part of the steps in which the encoder learns too. Then the latent space stands."""
    batch: int = 8
    lr: float = 4e-4
    """Learning rate of the decoder."""
    discriminator_lr: float = 1.2e-3
    """Learning rate of the discriminator: a larger one, as in Heusel et al. 2017, lest it lag behind."""
    lr_warmup: int = 100
    """Steps in which the learning rates rise linearly."""
    gan_warmup: int = 300
    """Steps in which the discriminator learns before it is used for the autoencoder."""
    smoothing: float = 0.5
    """Latents are blended with their 3x3 mean by a random part up to this."""
    noise: float = 0.25
    """Latents get noise of a random standard deviation up to this."""
    ema: float = 0.9995
    """Decay of the running mean of the autoencoder's weights, which is the result."""
    seed: int = 0
    evaluate_every: int = 500
    """Steps between two evaluations, each of which writes the log."""
    checkpoint_minutes: float = 5.0
    seconds: float | None = None
    """Wall time that the training may take; the last third of it decays the learning rates, too, and the encoder learns
    in `encoder_part` of it."""


def corrupt_latents(latents: torch.Tensor, options: GanOptions, generator: torch.Generator) -> torch.Tensor:
    """Latents [B, 4, h, w] as a sampler might give them: each row smoothed and noisy by its own random amount.

    Random numbers are drawn on the CPU, so a seed means the same on every device.
    """
    rows = (len(latents), 1, 1, 1)
    part = options.smoothing * torch.rand(rows, generator=generator)
    noise = options.noise * torch.rand(rows, generator=generator) * torch.randn(latents.shape, generator=generator)
    smooth = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return latents + part.to(latents.device) * (smooth - latents) + noise.to(latents.device)


def texture_loss(decoded: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """How far the mean gradients of windows of 8x8 pixels are from those of `image`, [B, C, H, W] both.

    Mean of |log((a + c) / (b + c))|, by direction and channel, with c = 0.01. It asks for as much texture, flat areas
    counting as much as busy ones, and leaves its exact place to the other losses: the absolute error of gradients is
    least where uncertain texture is left out.
    """
    logs = [
        torch.log(F.avg_pool2d(x.diff(dim=dim).abs(), 8, ceil_mode=True) + 0.01)
        for x in (decoded, image)
        for dim in (2, 3)
    ]
    return ((logs[0] - logs[2]).abs().mean() + (logs[1] - logs[3]).abs().mean()) / 2


@torch.no_grad()
def evaluate(
    autoencoder: MiniAutoencoder, anchor: nn.Module, pictures: list[torch.Tensor], perceptual: PerceptualDistance
) -> dict[str, float]:
    """Means over whole pictures [1, 3, H, W] in [-1, 1]: PSNR, feature distance and `texture_loss` of the autoencoder
    and (``anchor_…``) of its decoder on the anchor's latents; the distance between the two latents, and the spread of
    the autoencoder's."""
    rows = []
    for image in pictures:
        latents, anchored = autoencoder.encode(image), anchor(image)
        row = {"latent_shift": (latents - anchored).square().mean().sqrt().item(), "latent_std": latents.std().item()}
        for name, given in {"": latents, "anchor_": anchored}.items():
            decoded = autoencoder.decode(given).clamp(-1, 1)
            row |= {
                f"{name}psnr": psnr(decoded, image),
                f"{name}feature_distance": perceptual(decoded, image).item(),
                f"{name}texture_distance": texture_loss(decoded, image).item(),
            }
        rows.append(row)
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


class GanTraining:
    """Networks and optimiser of a run, and a step of them.

    Args:
        autoencoder: trained in place.
    """

    def __init__(
        self,
        autoencoder: MiniAutoencoder,
        options: GanOptions,
        device: torch.device,
        teacher: AutoencoderTiny | None = None,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.discriminator = MultiscaleDiscriminator()
        self.options, self.device, self.autoencoder, self.teacher = options, device, autoencoder, teacher
        self.ema = copy.deepcopy(autoencoder)
        self.anchor: nn.Module = copy.deepcopy(autoencoder.encoder) if teacher is None else teacher.encoder
        trained: list[Any] = [autoencoder.encoder, autoencoder.decoder, self.discriminator]
        frozen: list[Any] = [self.ema, self.anchor, *([] if teacher is None else [teacher])]
        for module in trained:
            module.to(device, memory_format=torch.channels_last).requires_grad_(True)
        for module in frozen:
            module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        own = {"anchor": self.anchor} if teacher is None else {}
        self.modules = {"autoencoder": autoencoder, "ema": self.ema, "discriminator": self.discriminator, **own}
        """The networks of a checkpoint. The teacher is in none."""
        rates = (options.encoder_lr, options.lr, options.discriminator_lr)
        groups = [{"params": list(x.parameters()), "relative": lr} for x, lr in zip(trained, rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.99), weight_decay=0.0, fused=True)

    def train_step(
        self, step: int, images: torch.Tensor, perceptual: PerceptualDistance, time_left: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Train autoencoder and discriminator in step `step` (from 0).

        Args:
            images: crops [B, 3, side, side].
            time_left: part of the time limit that is left, 1 to 0.

        Returns:
            The parts of the autoencoder's loss, and ``discriminator``, the loss of the discriminator.
        """
        options = self.options
        train_encoder = step < options.encoder_part * options.steps and 1 - time_left <= options.encoder_part
        rise = min(1.0, (step + 1) / options.lr_warmup)
        set_learning_rate(self.optimizer, rise * min(1.0, 3 * (options.steps - step) / options.steps, 3 * time_left))
        generator = rng_for(options.seed, RngStream.STEP, step)
        with autocast(self.device, "auto"):
            with torch.set_grad_enabled(train_encoder):
                latents = self.autoencoder.encode(images).float()
            with torch.no_grad():
                anchor = self.anchor(images).float() if train_encoder or self.teacher is not None else latents
            given, target = self.batch(latents, anchor, images)
            decoded = self.autoencoder.decode(corrupt_latents(given, options, generator)).float()
            losses = {
                "quarter": F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(images, 4)),
                "full": F.l1_loss(decoded, target),
                "texture": texture_loss(decoded, target),
                "anchor": F.mse_loss(latents, anchor) + F.l1_loss(latents, anchor),
                "perceptual": perceptual(decoded, target),
            }
            real, fake = self.discriminator(target), self.discriminator(decoded.detach())
            if step >= options.gan_warmup:
                self.discriminator.requires_grad_(False)
                scores = self.discriminator(decoded)
                self.discriminator.requires_grad_(True)
                losses |= {"matching": feature_matching(real, scores), "adversarial": g_loss(scores)}
        generator_loss = torch.stack([LOSS_WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
        discriminator_loss = d_loss(real, fake)
        self.optimizer.zero_grad(set_to_none=True)
        learner = self.autoencoder if train_encoder else self.autoencoder.decoder
        generator_loss.backward(inputs=list(learner.parameters()))
        discriminator_loss.backward()
        nn.utils.clip_grad_norm_(self.autoencoder.parameters(), 1.0)
        self.optimizer.step()
        update_ema(self.ema, self.autoencoder, options.ema, step + 1)
        return {**losses, "discriminator": discriminator_loss}

    def batch(
        self, latents: torch.Tensor, anchor: torch.Tensor, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents to decode and images to come near. With a teacher the first rows are the teacher's, and no gradient
        goes to the encoder."""
        if self.teacher is None:
            return latents, images
        count = round(TAUGHT * len(images))
        with torch.no_grad():
            target = torch.cat([self.teacher.decoder(anchor[:count]).float().clamp(-1, 1), images[count:]])
            given = torch.cat([anchor[:count], latents[count:]])
        return given, target.contiguous(memory_format=torch.channels_last)


def train_vae_gan(
    autoencoder: MiniAutoencoder,
    crops: Crops,
    options: GanOptions,
    folder: Path,
    perceptual: PerceptualDistance,
    *,
    resume: bool = False,
    teacher: AutoencoderTiny | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Train `autoencoder` in place; it ends with the running mean of its weights, frozen, on the CPU.

    Args:
        folder: gets ``finetune_gan.checkpoint.safetensors``, and at every evaluation ``finetune_gan.log.json``.
        perceptual: the perceptual loss: `LiteDistance` on `device`.
        teacher: its encoder anchors the latents; None: that of `autoencoder` at the start.
        device: where to train. Random numbers are drawn on the CPU, so a seed means the same on every device.

    Errors are those of `TrainingLoop` and its `run`.
    """
    device = torch.device(device)
    training = GanTraining(autoencoder, options, device, teacher)
    loop = TrainingLoop(
        *("mini autoencoder, GAN", options, folder / "finetune_gan.checkpoint.safetensors"),
        *(training.modules, training.optimizer),
        resume=resume,
        device=device,
    )
    pictures = [x.to(device, memory_format=torch.channels_last) for x in crops.pictures(24)]
    parts: list[dict[str, float]] = []

    def train_step(step: int) -> float:
        rng = np.random.default_rng([options.seed, step])
        images = crops.batch(crops.train, options.batch, rng).to(device)
        losses = training.train_step(step, images, perceptual, loop.time_left)
        parts.append(dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True)))  # one wait
        loss = sum(LOSS_WEIGHTS.get(name, 1.0) * value for name, value in parts[-1].items())
        require_finite(loss, step)
        return loss

    def measure(_: float) -> None:
        means = {name: float(np.mean([row[name] for row in parts if name in row])) for name in parts[-1]}
        parts.clear()
        measured = evaluate(training.ema, training.anchor, pictures, perceptual)
        loop.history.append({"step": loop.step, **means, **measured})
        log.info("%s", loop.history[-1])
        loop.write_log(folder / "finetune_gan.log.json")

    loop.run(train_step, measure)
    loop.save()
    autoencoder.load_state_dict(training.ema.state_dict())
    autoencoder.to("cpu").eval().requires_grad_(False)
