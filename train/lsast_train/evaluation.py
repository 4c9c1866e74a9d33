"""The held-out loss of every stage, measured the same way each time so that two steps can be compared."""

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
        base: its ControlNet is left out, as in the released training.
        latents, noise: clean latents and their noise, [B, 4, h, w].
        timestep: [B].
        mixed_precision: of the U-Net; prompts are always computed in float32.
        dropout: as of `PromptSpace.embeddings`.
    """
    noisy = base.add_noise(latents, noise, timestep)
    contexts = space.contexts_by_group(timestep, dropout)
    with autocast(latents.device, mixed_precision):
        predicted = base.eps(noisy, timestep, contexts)
    return (predicted.float() - noise).square().mean((1, 2, 3))


class ValidationSet:
    """Fixed latents [N, 4, h, w] and noise: each latent is measured once in every stage, at a timestep of its own."""

    def __init__(self, base: Base, latents: torch.Tensor, seed: int, mixed_precision: MixedPrecision) -> None:
        self._base, self.latents, self._seed, self._mixed_precision = base, latents, seed, mixed_precision

    @torch.no_grad()
    def losses(self, space: PromptSpace, stages: Iterable[int]) -> torch.Tensor:
        """Mean squared error of the noise, [space.stages] float64; zero for stages that are not in `stages`."""
        stages = list(stages)
        losses = torch.zeros(space.stages, dtype=torch.float64)
        if not stages:
            return losses
        shape, device = self.latents.shape, self.latents.device
        noises = [torch.randn(shape, generator=rng_for(self._seed, RngStream.VALIDATION_NOISE, s)) for s in stages]
        # The timesteps of the latents in a stage are spread evenly over it.
        length = self._base.config.noise.train_steps / space.stages
        times = [int(length * (stage + (row + 0.5) / shape[0])) for stage in stages for row in range(shape[0])]
        noise, timestep = torch.cat(noises).to(device), torch.tensor(times, device=device)
        rows = (self.latents.repeat(len(stages), 1, 1, 1), noise, timestep)
        count = max(1, _CELLS // self.latents[0, 0].numel())
        errors = [
            noise_error(self._base, space, latents, drawn, at, self._mixed_precision)
            for latents, drawn, at in zip(*(row.split(count) for row in rows), strict=True)
        ]
        losses[stages] = torch.cat(errors).cpu().double().view(len(stages), -1).mean(1)
        return losses
