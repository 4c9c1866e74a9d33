"""The four modules that are traced, one for each graph of `lsast_engines.bundle.graph_spec`.

Their parameters have the names of the weights in ``base.safetensors`` (``unet.…``, ``controlnet.…``,
``autoencoder.…``), so that an exported initializer can be found in the file. Where a graph needs a network changed (its
processors, the embedding of the edges), a context manager changes it and restores it at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from lsast_engines.bundle.graph_spec import Geometry
from lsast_train.base.attention import packed_kv
from lsast_train.base.base import Base
from lsast_train.base.kv_packing import kv_layouts

SCORES_LIMIT = 128 << 20
"""Largest size in bytes of a self-attention's scores, for one picture of native size and two guidance rows."""


class SplitProcessor:
    """Attention processor of a self-attention that computes a few heads at a time, with the same result.

    Runtimes hold softmax(Q Kᵀ) of all heads in memory, which is gigabytes at the top level of Stable Diffusion 1.5.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, kv: Any = None, **_: Any
    ) -> torch.Tensor:
        """Run `attn` on `hidden_states` [B, N, C]; `kv` is for the cross-attentions."""
        batch, _count, width = hidden_states.shape
        shape = (batch, -1, attn.heads, width // attn.heads)
        rows = (to(hidden_states).view(shape).transpose(1, 2) for to in (attn.to_q, attn.to_k, attn.to_v))
        parts = zip(*(row.chunk(self.groups, dim=1) for row in rows), strict=True)
        mixed = torch.cat([F.scaled_dot_product_attention(q, k, v, scale=attn.scale) for q, k, v in parts], dim=1)
        out: torch.Tensor = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).reshape(batch, -1, width)))
        return out


class VaeEncoderGraph(nn.Module):
    """Graph `vae_encoder`."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.autoencoder = base.autoencoder
        self._base = base

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image [B, 3, H, W] → mean and standard deviation [B, 4, h, w]."""
        return self._base.encode(image)


class ControlNetCondGraph(nn.Module):
    """Graph `controlnet_cond`: the ControlNet's embedding of the edges, which is computed once a run."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.controlnet = base.controlnet

    def forward(self, edges: torch.Tensor) -> torch.Tensor:
        """Edges [B, 3, H, W] → hint features [B, C, h, w]."""
        hint: torch.Tensor = self.controlnet.controlnet_cond_embedding(edges)
        return hint


class DenoiserGraph(nn.Module):
    """Graph `denoiser`: ControlNet and U-Net of one step."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.unet = base.unet
        self.controlnet = base.controlnet
        self._base = base

    def forward(
        self,
        latent: torch.Tensor,
        hint: torch.Tensor,
        timestep: torch.Tensor,
        kv_unet: torch.Tensor,
        kv_control: torch.Tensor,
        control_scale: torch.Tensor,
    ) -> torch.Tensor:
        """One step; shapes as in `lsast_engines.bundle.graph_spec.graph_specs`."""
        guidance, batch = kv_unet.shape[:2]

        def repeat(rows: torch.Tensor) -> torch.Tensor:  # [B, …] → [G·B, …]
            return rows.unsqueeze(0).expand(guidance, *rows.shape).flatten(0, 1)

        down, mid = self.controlnet(
            *(latent, timestep, None, hint),
            conditioning_scale=control_scale,
            cross_attention_kwargs=packed_kv(kv_control),
            return_dict=False,
        )
        latents, timesteps = repeat(latent), repeat(timestep)
        output = self.unet(
            latents,
            timesteps,
            None,
            cross_attention_kwargs=packed_kv(kv_unet.flatten(0, 1)),
            down_block_additional_residuals=[repeat(residual) for residual in down],
            mid_block_additional_residual=repeat(mid),
            return_dict=False,
        )[0]
        eps: torch.Tensor = self._base.eps_from_output(output, latents, timesteps).unflatten(0, (guidance, batch))
        return eps


class VaeDecoderGraph(nn.Module):
    """Graph `vae_decoder`."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.autoencoder = base.autoencoder
        self._base = base

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Unscaled latent [B, 4, h, w] → image [B, 3, H, W]."""
        return self._base.decode(latent)


def head_groups(name: str, heads: int, levels: int, side: int) -> int:
    """The number of groups of heads of a self-attention with which its scores fit into `SCORES_LIMIT`.

    Args:
        name: module path, e.g. ``up_blocks.3.attentions.0.transformer_blocks.0.attn1``.
        heads: its heads.
        levels: levels of the network; each halves the side.
        side: of the native latent, in cells.
    """
    block, index, *_ = name.split(".")
    deepest = levels - 1
    level = {"down_blocks": int(index), "up_blocks": deepest - int(index)} if index.isdecimal() else {}
    tokens = (side >> level.get(block, deepest)) ** 2
    scores = 2 * heads * tokens**2 * 4  # two guidance rows, float32
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (scores / n <= SCORES_LIMIT or n == heads))


@contextlib.contextmanager
def split_attention(network: Any, side: int) -> Iterator[None]:
    """Let self-attentions of `network` that need it compute a few heads at a time, while the block runs."""
    levels = len(network.config.block_out_channels)
    before = []
    try:
        for name, module in network.named_modules():
            if isinstance(module, Attention) and not module.is_cross_attention:
                groups = head_groups(name, module.heads, levels, side)
                if groups > 1:
                    before.append((module, module.processor))
                    module.set_processor(SplitProcessor(groups))
        yield
    finally:
        for module, processor in before:
            module.set_processor(processor)


def geometry(base: Base) -> Geometry:
    """The widths of `base`, from its networks, which may be on the meta device (`base_on_meta`)."""
    unet, control = kv_layouts(base)
    side = base.config.multiple
    encoder = base.controlnet.controlnet_cond_embedding
    with torch.no_grad():
        hint = encoder(next(encoder.parameters()).new_zeros(1, 3, side, side))
    return Geometry(
        hint_channels=hint.shape[1],
        tokens=base.config.tokens,
        unet_width=unet.width,
        control_width=control.width,
        latent_channels=int(base.unet.config.in_channels),
        factor=side // hint.shape[2],
    )
