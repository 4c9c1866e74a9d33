"""The held-out loss of every stage, measured the same way each time so that two steps can be compared."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .base.base import Base, autocast
from .options import MixedPrecision
from .prompts.prompt_space import PromptSpace
from .training.rng import RngStream, rng_for

_CELLS = 16 * 32 * 32
"""Latent cells of one call of the U-Net: 16 pictures of 256 pixels, 4 of 512."""


def noise_error(
    base: Base,
    space: PromptSpace,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
    mixed_precision: MixedPrecision,
    dropout: torch.Generator | None = None,
) -> torch.Tensor:
    """Mean squared error of the predicted noise for each row, [B] float32: the loss of docs/method.md §3.

    Args:
        base: the frozen base; its ControlNet is left out, as in the released training.
        latents, noise: clean latents and their noise, [B, 4, h, w].
        timestep: [B]; `space` gives its contexts.
        mixed_precision: of the U-Net; prompts are always computed in float32.
        dropout: random numbers for the generator's dropout in training; None leaves dropout out.
    """
    noisy = base.add_noise(latents, noise, timestep)
    contexts = space.contexts_by_group(timestep, dropout)
    with autocast(latents.device, mixed_precision):
        predicted = base.eps(noisy, timestep, contexts)
    return (predicted.float() - noise).square().mean((1, 2, 3))


class ValidationSet:
    """Fixed latents, timesteps and noise: every latent is measured once in every stage, at a timestep of its own.

    Args:
        latents: [N, 4, h, w].
    """

    def __init__(self, base: Base, latents: torch.Tensor, seed: int, mixed_precision: MixedPrecision) -> None:
        self._base, self.latents, self._seed, self._mixed_precision = base, latents, seed, mixed_precision

    @torch.no_grad()
    def losses(self, space: PromptSpace, stages: Iterable[int]) -> torch.Tensor:
        """Mean squared error of the noise, [space.stages] float64; zero for stages that are not in `stages`."""
        stages = list(stages)
        losses = torch.zeros(space.stages, dtype=torch.float64)
        if not stages:
            return losses
        device = self.latents.device
        noise = torch.cat([self._noise(stage) for stage in stages]).to(device)
        timestep = torch.cat([self._timesteps(stage, space.stages) for stage in stages]).to(device)
        rows = (self.latents.repeat(len(stages), 1, 1, 1), noise, timestep)
        count = max(1, _CELLS // self.latents[0, 0].numel())
        errors = [
            noise_error(self._base, space, latents, drawn, times, self._mixed_precision)
            for latents, drawn, times in zip(*(row.split(count) for row in rows), strict=True)
        ]
        losses[stages] = torch.cat(errors).cpu().double().view(len(stages), -1).mean(1)
        return losses

    def _noise(self, stage: int) -> torch.Tensor:
        generator = rng_for(self._seed, RngStream.VALIDATION_NOISE, stage)
        return torch.randn(self.latents.shape, generator=generator)

    def _timesteps(self, stage: int, stages: int) -> torch.Tensor:
        """The timesteps [N] of the latents in `stage`, spread evenly over it."""
        count = len(self.latents)
        length = self._base.config.noise.train_steps / stages
        return torch.tensor([int(length * (stage + (index + 0.5) / count)) for index in range(count)])
