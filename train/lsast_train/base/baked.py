"""The frozen base as an exported denoiser computes it: keys and values in, no context, hint features beforehand."""

from __future__ import annotations

import torch

from ..options import MixedPrecision
from .attention import packed_kv
from .base import Base, autocast
from .kv_packing import skip_cond_embedding

Residuals = tuple[list[torch.Tensor], torch.Tensor]
"""What ControlNet adds to the U-Net's skip connections, and to its middle."""


class BakedBase:
    """A base that is called with packed keys and values (`lsast_train.base.kv_packing`) and with hint features."""

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
    ) -> Residuals:
        """ControlNet's residuals.

        Args:
            latent: [B, 4, h, w].
            timestep: [B].
            kv_control: [T, Wc], the same for all rows.
            hint: [B, C, h, w].
            scale: factor of all residuals.
        """
        kwargs = packed_kv(kv_control.expand(len(latent), -1, -1))
        controlnet = self.base.controlnet
        with skip_cond_embedding(controlnet):
            down, mid = controlnet(
                *(latent, timestep, None, hint),
                conditioning_scale=scale,
                cross_attention_kwargs=kwargs,
                return_dict=False,
            )
        return list(down), mid

    def eps(
        self, latent: torch.Tensor, timestep: torch.Tensor, kv_unet: torch.Tensor, residuals: Residuals
    ) -> torch.Tensor:
        """Predicted noise [B, 4, h, w] under keys and values [T, Wu], the same for all rows."""
        down, mid = residuals
        output = self.base.unet(
            *(latent, timestep, None),
            cross_attention_kwargs=packed_kv(kv_unet.expand(len(latent), -1, -1)),
            # The U-Net adds to the residuals it is given; they may serve again.
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return self.base.eps_from_output(output.float(), latent, timestep)

    def predict(
        self,
        latent: torch.Tensor,
        timestep: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor],
        hint: torch.Tensor,
        control: float,
        mixed_precision: MixedPrecision = "no",
    ) -> torch.Tensor:
        """One pass of ControlNet and U-Net, [B, 4, h, w] float32.

        Args:
            latent: [B, 4, h, w].
            timestep: [B].
            rows: keys and values of U-Net [T, Wu] and ControlNet [T, Wc].
            hint: [B, C, h, w].
            control: factor of the residuals.
        """
        with autocast(latent.device, mixed_precision):
            return self.eps(latent, timestep, rows[0], self.residuals(latent, timestep, rows[1], hint, control))
