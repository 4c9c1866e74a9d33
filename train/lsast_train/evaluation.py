"""The held-out loss of every stage, measured the same way each time so that two steps can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch

from .base.base import Base
from .options import Precision
from .prompts.prompt_space import PromptSpace

_CELLS = 16 * 32 * 32
"""Latent cells of one call of the U-Net: 16 pictures of 256 pixels, 4 of 512."""


class Purpose(IntEnum):
    """What random numbers are for; each purpose has its own."""

    STEP = 1
    TRAINING_VIEWS = 2
    HELD_OUT_VIEWS = 3
    INITIAL_CONTEXT = 4
    PROBE = 5
    DROPOUT = 6
    TEACHER = 7
    TEACHER_NOISED = 8
    CONTENT = 9


def seeded(seed: int, purpose: Purpose, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on `seed`, `purpose` and `numbers` (all at least 0), and on nothing else."""
    state = np.random.SeedSequence([seed, purpose, *numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def noise_error(
    base: Base,
    space: PromptSpace,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
    precision: Precision,
    dropout: torch.Generator | None = None,
) -> torch.Tensor:
    """Mean squared error of the predicted noise for each row, [B] float32.

    Args:
        base: the frozen base; its ControlNet is left out, as in the released training (docs/method.md §3).
        space: gives the contexts of `timestep`.
        latents: clean latents [B, 4, h, w].
        noise: [B, 4, h, w].
        timestep: [B].
        precision: of the U-Net; prompts are always computed in float32.
        dropout: what the generator draws its dropout from in training; None leaves it out.
    """
    noisy = base.add_noise(latents, noise, timestep)
    contexts = space.grouped(timestep, dropout)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=precision == "bf16"):
        predicted = base.eps(noisy, timestep, contexts)
    return (predicted.float() - noise).square().mean((1, 2, 3))


def round_unet(base: Base) -> None:
    """Store the weights of the U-Net's convolutions and linear maps in bf16: half the memory.

    Under ``precision="bf16"`` they are rounded at every call otherwise, so nothing is computed differently; the norms
    keep float32. The base serves no other precision any more.
    """
    for module in base.unet.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(torch.bfloat16)


class Probe:
    """Fixed latents, timesteps and noise: in every stage each latent is looked at once, at a timestep of its own.

    Args:
        base: the frozen base.
        latents: [N, 4, h, w].
        seed: of the noise.
        precision: of the U-Net.
    """

    def __init__(self, base: Base, latents: torch.Tensor, seed: int, precision: Precision) -> None:
        self._base, self._latents, self._seed, self._precision = base, latents, seed, precision

    def timesteps(self, stage: int, stages: int) -> torch.Tensor:
        """The timesteps [N] of the latents in `stage`, spread evenly over it."""
        count = len(self._latents)
        length = self._base.config.noise.train_steps / stages
        return torch.tensor([int(length * (stage + (index + 0.5) / count)) for index in range(count)])

    @torch.no_grad()
    def losses(self, space: PromptSpace, stages: Iterable[int]) -> torch.Tensor:
        """Mean squared error of the noise, [space.stages] float64; zero for stages that are not asked for."""
        wanted = list(stages)
        losses = torch.zeros(space.stages, dtype=torch.float64)
        if not wanted:
            return losses
        device = self._latents.device
        noises = [
            torch.randn(self._latents.shape, generator=seeded(self._seed, Purpose.PROBE, stage)) for stage in wanted
        ]
        times = [self.timesteps(stage, space.stages) for stage in wanted]
        rows = (self._latents.repeat(len(wanted), 1, 1, 1), torch.cat(noises).to(device), torch.cat(times).to(device))
        count = max(1, _CELLS // self._latents[0, 0].numel())
        errors = [
            noise_error(self._base, space, latents, noise, timestep, self._precision)
            for latents, noise, timestep in zip(*(row.split(count) for row in rows), strict=True)
        ]
        losses[wanted] = torch.cat(errors).double().cpu().view(len(wanted), -1).mean(1)
        return losses
