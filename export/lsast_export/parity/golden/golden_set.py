"""Golden sets in memory: networks, inputs and results that LSAST's released code computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Attention heads of every layer; None where the set does not say."""
    head_channels: int | None
    """Channels of every head, for sets that fix those instead."""
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
    """None where the unconditional half was not computed: guidance 1."""
    sliced: bool
    """Whether the U-Net saw the contexts of each stage. With guidance 1 the released code hands all of them over
    unsliced, so that 0, 1 and 2 serve every stage, but for ControlNet (docs/method.md §8.6)."""
    start_latent: torch.Tensor
    """[B, 4, h, w], as `final_latent`."""
    final_latent: torch.Tensor
    residuals: tuple[torch.Tensor, ...]
    timesteps: tuple[int, ...] | None
    """As recorded."""
    training: tuple[TrainingCase, ...]
    architecture: dict[str, Any]
    """What the metadata says of the networks beside the heads, by the name of the released code's option."""
    notes: tuple[str, ...]
    """What was concluded where the metadata says nothing."""

    def style_contexts(self, stage: int) -> torch.Tensor:
        """The style's contexts of one stage, [B, 3, T, dim]: number s + l for layer group l (docs/method.md §1.4)."""
        return self.contexts[stage : stage + len(GROUPS)].transpose(0, 1)

    def unet_contexts(self, stage: int) -> list[torch.Tensor]:
        """The U-Net's contexts [B, 3, T, dim] of one stage, for each guidance half: [unconditional,] conditional."""
        style = self.style_contexts(stage if self.sliced else 0)
        return [style] if self.eps_uncond is None else [self.unconditional.expand_as(style), style]
