"""The frozen base as an exported denoiser computes it: keys and values in, no context, the hint encoder beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..options import Precision
from .base import Base
from .kv_packing import KeyValueBox, PackedLayers, baked_attention, hint_bypassed, pack

Residuals = tuple[list[torch.Tensor], torch.Tensor]
"""What ControlNet adds to the U-Net's skip connections, and to its middle."""


class BakedBase:
    """A base whose cross-attentions read packed keys and values; made by `baked_base`."""

    def __init__(self, base: Base, unet: PackedLayers, control: PackedLayers, hint_encoder: Any) -> None:
        self.base = base
        self.unet, self.control = unet, control
        """How keys and values of the two networks are packed."""
        self.unet_box, self.control_box = KeyValueBox(), KeyValueBox()
        self._hint_encoder = hint_encoder

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.null_context.device

    @torch.no_grad()
    def hints(self, edges: torch.Tensor) -> torch.Tensor:
        """Edges [B, 3, H, W] of 0 and 1 → hint features [B, C, h, w]."""
        features: torch.Tensor = self._hint_encoder(edges)
        return features

    def residuals(
        self,
        latent: torch.Tensor,
        timestep: torch.Tensor,
        kv_control: torch.Tensor,
        hint: torch.Tensor,
        scale: float = 1.0,
    ) -> Residuals:
        """ControlNet's answer.

        Args:
            latent: [B, 4, h, w].
            timestep: [B].
            kv_control: [T, Wc], the same for all rows.
            hint: [B, C, h, w].
            scale: what all of it is multiplied with.
        """
        self.control_box.packed = kv_control.expand(len(latent), -1, -1)
        down, mid = self.base.controlnet(latent, timestep, None, hint, conditioning_scale=scale, return_dict=False)
        return list(down), mid

    def eps(
        self, latent: torch.Tensor, timestep: torch.Tensor, kv_unet: torch.Tensor, residuals: Residuals
    ) -> torch.Tensor:
        """Predicted noise [B, 4, h, w] under keys and values [T, Wu], the same for all rows."""
        self.unet_box.packed = kv_unet.expand(len(latent), -1, -1)
        down, mid = residuals
        output = self.base.unet(
            latent,
            timestep,
            None,
            # The U-Net adds to what it is handed; the residuals may serve again.
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
        precision: Precision = "fp32",
    ) -> torch.Tensor:
        """One pass, [B, 4, h, w] float32.

        Args:
            latent: [B, 4, h, w].
            timestep: [B].
            rows: keys and values of U-Net [T, Wu] and ControlNet [T, Wc].
            hint: [B, C, h, w].
            control: scale of the residuals.
            precision: of the networks.
        """
        with torch.autocast(latent.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return self.eps(latent, timestep, rows[0], self.residuals(latent, timestep, rows[1], hint, control))


@contextlib.contextmanager
def baked_base(base: Base) -> Iterator[BakedBase]:
    """`base` with its networks reading keys and values as long as the block runs; it leaves as it came."""
    unet, control = pack(base)
    baked = BakedBase(base, unet, control, base.controlnet.controlnet_cond_embedding)
    with (
        baked_attention(unet, baked.unet_box),
        baked_attention(control, baked.control_box),
        hint_bypassed(base.controlnet),
    ):
        yield baked
