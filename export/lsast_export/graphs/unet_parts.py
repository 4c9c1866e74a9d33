"""The denoiser in parts: three modules, traced beside the whole one (`lsast_engines.bundle.graph_spec.split_specs`).

A run may skip the ControlNet at some steps, or all of the U-Net but its outermost level (DeepCache, Ma et al. 2023,
arXiv 2312.00858). Parameters have the names of ``base.safetensors``, as in `modules`, so that the parts add no weights
to a bundle.

The U-Net runs block by block here, as in diffusers' `UNet2DConditionModel.forward` for networks without class, image or
adapter conditions; `parity` compares with that function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lsast_engines.bundle.graph_spec import UnetSplit
from lsast_train.base.attention import packed_kv
from lsast_train.base.base import Base


class ControlNetGraph(nn.Module):
    """Graph `controlnet`."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.controlnet = base.controlnet

    def forward(
        self,
        latent: torch.Tensor,
        hint: torch.Tensor,
        timestep: torch.Tensor,
        kv_control: torch.Tensor,
        control_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """The scaled residuals of one step, the middle block's last."""
        down, mid = self.controlnet(
            *(latent, timestep, None, hint),
            conditioning_scale=control_scale,
            cross_attention_kwargs=packed_kv(kv_control),
            return_dict=False,
        )
        return (*down, mid)


class _Inputs(NamedTuple):
    """What every block of the U-Net takes, for each row of guidance and batch."""

    latents: torch.Tensor
    """[G·B, 4, h, w]"""
    timesteps: torch.Tensor
    """[G·B]"""
    embedded: torch.Tensor
    """[G·B, E]: the time embedding."""
    kv: dict[str, Any]
    """See `packed_kv`."""


class _UnetPart(nn.Module):
    """What `unet_full` and `unet_outer` share: guidance rows, the embedding of the step, the outermost level."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.unet = base.unet
        self._base = base

    def _rows(self, rows: torch.Tensor, guidance: int) -> torch.Tensor:
        """[B, …] → [G·B, …]."""
        return rows.unsqueeze(0).expand(guidance, *rows.shape).flatten(0, 1)

    def _inputs(self, latent: torch.Tensor, timestep: torch.Tensor, kv_unet: torch.Tensor) -> _Inputs:
        guidance = kv_unet.shape[0]  # len() would fix it in the traced graph
        kv = packed_kv(kv_unet.flatten(0, 1))
        latents, timesteps = self._rows(latent, guidance), self._rows(timestep, guidance)
        embedded = self.unet.time_embedding(self.unet.get_time_embed(latents, timesteps))
        return _Inputs(latents, timesteps, embedded, kv)

    def _noise(self, feature: torch.Tensor, skips: Sequence[torch.Tensor], inputs: _Inputs) -> torch.Tensor:
        """The last up block and the output convolution: `feature` and the outermost skips → eps [G·B, 4, h, w]."""
        sample = _run(self.unet.up_blocks[-1], feature, inputs, res_hidden_states_tuple=tuple(skips))
        output = self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(sample)))
        return self._base.eps_from_output(output, inputs.latents, inputs.timesteps)


class UnetFullGraph(_UnetPart):
    """Graph `unet_full`."""

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, kv_unet: torch.Tensor, *residuals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole U-Net: eps [G, B, 4, h, w], and the input of the last up block, [G, B, C, h, w]."""
        guidance, batch = kv_unet.shape[:2]
        inputs = self._inputs(latent, timestep, kv_unet)
        sample = self.unet.conv_in(inputs.latents)
        skips = [sample]
        for block in self.unet.down_blocks:
            sample, more = _run(block, sample, inputs)
            skips += more
        *down, mid = (self._rows(residual, guidance) for residual in residuals)
        skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
        sample = self.unet.mid_block(sample, inputs.embedded, cross_attention_kwargs=inputs.kv) + mid
        for block in self.unet.up_blocks[:-1]:
            count = len(block.resnets)
            sample = _run(block, sample, inputs, res_hidden_states_tuple=tuple(skips[-count:]))
            skips = skips[:-count]
        eps = self._noise(sample, skips, inputs)
        return eps.unflatten(0, (guidance, batch)), sample.unflatten(0, (guidance, batch))


class UnetOuterGraph(_UnetPart):
    """Graph `unet_outer`."""

    def forward(
        self,
        latent: torch.Tensor,
        timestep: torch.Tensor,
        kv_unet: torch.Tensor,
        *residuals_and_feature: torch.Tensor,
    ) -> torch.Tensor:
        """The outermost level, on a cached feature [G, B, C, h, w]: eps [G, B, 4, h, w]."""
        *residuals, feature = residuals_and_feature
        guidance, batch = kv_unet.shape[:2]
        inputs = self._inputs(latent, timestep, kv_unet)
        sample = self.unet.conv_in(inputs.latents)
        skips = [sample]
        block = self.unet.down_blocks[0]
        for place, resnet in enumerate(block.resnets):
            sample = resnet(sample, inputs.embedded)
            if getattr(block, "has_cross_attention", False):
                sample = block.attentions[place](sample, cross_attention_kwargs=inputs.kv, return_dict=False)[0]
            skips.append(sample)
        skips = [skip + self._rows(residual, guidance) for skip, residual in zip(skips, residuals, strict=True)]
        eps = self._noise(feature.flatten(0, 1), skips, inputs)
        rows: torch.Tensor = eps.unflatten(0, (guidance, batch))
        return rows


def _run(block: Any, sample: torch.Tensor, inputs: _Inputs, **skips: Any) -> Any:
    """The output of a down or up block, which takes keys and values only if it has cross-attention."""
    kwargs = {"cross_attention_kwargs": inputs.kv} if getattr(block, "has_cross_attention", False) else {}
    return block(hidden_states=sample, temb=inputs.embedded, **kwargs, **skips)


def unet_split(base: Base) -> UnetSplit:
    """Where the denoiser of `base` is cut; its networks may be without weights (`base_on_meta`)."""
    widths = base.unet.config.block_out_channels
    residuals = [(widths[0], 0)]
    for level, (width, block) in enumerate(zip(widths, base.unet.down_blocks, strict=True)):
        residuals += [(width, level)] * len(block.resnets)
        residuals += [(width, level + 1)] * (block.downsamplers is not None)
    deepest = len(widths) - 1
    last = base.unet.up_blocks[-1].resnets[0]
    return UnetSplit(
        residuals=(*residuals, (widths[-1], deepest)),
        outer=len(base.unet.up_blocks[-1].resnets),
        feature=last.in_channels - widths[0],
    )
