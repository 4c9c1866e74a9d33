"""Golden sets in memory: networks, inputs and results that LSAST's released code computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lsast_engines.diffusion.timesteps import TimestepSchedule
from lsast_train.base.attention import GROUPS

STAGES = 10
"""Stages of the released code."""

RESIDUAL = "control_residual_"
"""Prefix of the names of ControlNet's residuals, in the order of the input blocks, the middle last."""


@dataclass(frozen=True, eq=False)
class TrainingCase:
    """One training step of the released code."""

    latents: torch.Tensor
    """Clean latents [B, 4, h, w]."""
    noise: torch.Tensor
    timestep: int
    contexts: torch.Tensor
    """[K, T, dim]."""
    loss: float
    gradient: torch.Tensor
    """Of the loss to the contexts, [K, T, dim]: zero but for those that the set names."""


@dataclass(frozen=True, eq=False)
class GoldenSet:
    """A golden set in memory, float32; B pictures, n steps."""

    prefix: Path
    unet: dict[str, torch.Tensor]
    control: dict[str, torch.Tensor]
    heads: int | None
    """Attention heads of every layer; None if the metadata does not say."""
    guidance: float
    schedule: TimestepSchedule
    z0: torch.Tensor
    """[B, 4, h, w], as `noise`."""
    noise: torch.Tensor
    hint: torch.Tensor
    """[B, 3, 8h, 8w]."""
    contexts: torch.Tensor
    """[K, B, T, dim]."""
    unconditional: torch.Tensor
    """[T, dim]."""
    latents_in: torch.Tensor
    """[n, B, 4, h, w], as both eps."""
    eps_cond: torch.Tensor
    eps_uncond: torch.Tensor | None
    """None at guidance 1, where the unconditional half was not computed."""
    start_latent: torch.Tensor
    """[B, 4, h, w], as `final_latent`."""
    final_latent: torch.Tensor
    residuals: tuple[torch.Tensor, ...]
    timesteps: tuple[int, ...] | None
    """As recorded."""
    training: tuple[TrainingCase, ...]
    notes: tuple[str, ...]
    """Conclusions about what the metadata does not say."""

    def style_contexts(self, stage: int) -> torch.Tensor:
        """The style's contexts of one stage, [B, 3, T, dim]: number s + l for layer group l (docs/method.md §1.4)."""
        return self.contexts[stage : stage + len(GROUPS)].transpose(0, 1)

    def unet_contexts(self, stage: int) -> list[torch.Tensor]:
        """The U-Net's contexts [B, 3, T, dim] of one stage, for each guidance half: [unconditional,] conditional.

        At guidance 1 the released code passes all contexts unsliced, so that 0, 1 and 2 serve every stage of the
        U-Net, but not of ControlNet (docs/method.md §8.6).
        """
        style = self.style_contexts(0 if self.guidance == 1 else stage)
        return [style] if self.eps_uncond is None else [self.unconditional.expand_as(style), style]
