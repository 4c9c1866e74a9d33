"""The frozen base as an exported denoiser computes it: keys and values in, no context, hint features beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..options import MixedPrecision
from .attention import packed_kv
from .base import Base, autocast
from .kv_packing import skip_cond_embedding


class BakedBase:
    """A base that is called with packed keys and values (`lsast_train.base.kv_packing`) and with hint features.

    Latents are [B, 4, h, w], timesteps [B], hint features [B, C, h, w]; keys and values [T, W] are the same for all
    rows.
    """

    def __init__(self, base: Base) -> None:
        self.base = base

    @torch.no_grad()
    def hints(self, edges: torch.Tensor) -> torch.Tensor:
        """Edges [B, 3, H, W] of 0 and 1 → hint features [B, C, h, w]."""
        features: torch.Tensor = self.base.controlnet.controlnet_cond_embedding(edges)
        return features

    def residuals(
        self,
        latent: torch.Tensor,
        timestep: torch.Tensor,
        kv_control: torch.Tensor,
        hint: torch.Tensor,
        scale: float = 1.0,
    ) -> dict[str, Any]:
        """ControlNet's residuals, times `scale`, for `eps`."""
        with skip_cond_embedding(self.base.controlnet):
            kv = packed_kv(kv_control.expand(len(latent), -1, -1))
            return self.base.control(latent, timestep, kv, hint, scale)

    def eps(
        self, latent: torch.Tensor, timestep: torch.Tensor, kv_unet: torch.Tensor, residuals: Mapping[str, Any]
    ) -> torch.Tensor:
        """Predicted noise [B, 4, h, w]."""
        kv = packed_kv(kv_unet.expand(len(latent), -1, -1))
        return self.base.eps(latent, timestep, kv, residuals=residuals)

    def predict(
        self,
        latent: torch.Tensor,
        timestep: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor],
        hint: torch.Tensor,
        control: float,
        mixed_precision: MixedPrecision = "no",
    ) -> torch.Tensor:
        """One pass of both networks, [B, 4, h, w]; `rows` are keys and values of U-Net and ControlNet."""
        with autocast(latent.device, mixed_precision):
            return self.eps(latent, timestep, rows[0], self.residuals(latent, timestep, rows[1], hint, control))
