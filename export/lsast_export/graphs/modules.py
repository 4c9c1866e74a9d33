"""The modules that are traced. `unet_outer` is cut out of `unet_full` (`trace`); `small_decoder` has its own.

Their parameters have the names of the weights in ``base.safetensors`` (``unet.…``, ``controlnet.…``,
``autoencoder.…``), so that an exported initializer can be found in the file, and the split graphs add no weights to
a bundle. Where a graph needs a network changed (its processors, the embedding of the edges), a copy of the network is.

With the split graphs a run skips the ControlNet and all of the U-Net but its outermost level between full steps
(DeepCache, Ma et al. 2023, arXiv 2312.00858).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from lsast_engines.bundle.graph_spec import (
    CONTROLNET,
    CONTROLNET_COND,
    DENOISER,
    UNET_FULL,
    VAE_DECODER,
    VAE_ENCODER,
    Geometry,
    UnetSplit,
)
from lsast_train.base.attention import cross_attention_layers, packed_kv
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import LazyBase

NETWORKS = ("unet", "controlnet", "autoencoder")
"""The networks that the graphs are made of."""

SCORES_LIMIT = 128 << 20
"""Largest size in bytes of a self-attention's scores, for one picture of native size and two guidance rows."""


def base_on_meta(lazy: LazyBase) -> Base:
    """The base of `lazy`, its networks on torch's meta device: shapes without memory, which is enough to trace."""
    networks = {name: lazy.networks[name]().on_meta() for name in NETWORKS}
    return Base(lazy.config, lazy.fingerprint, null_context=lazy.null_context, **networks)


def geometry(base: Base) -> Geometry:
    """The widths of `base`, from its networks, which may be on the meta device (`base_on_meta`)."""
    unet, control = (
        sum(2 * layer.width for layer in cross_attention_layers(network)) for network in (base.unet, base.controlnet)
    )
    side = base.config.multiple
    encoder = base.controlnet.controlnet_cond_embedding
    with torch.no_grad():
        hint = encoder(next(encoder.parameters()).new_zeros(1, 3, side, side))
    return Geometry(
        hint_channels=hint.shape[1],
        tokens=base.config.tokens,
        unet_width=unet,
        control_width=control,
        latent_channels=int(base.unet.config.in_channels),
        factor=side // hint.shape[2],
    )


def unet_split(base: Base) -> UnetSplit:
    """Where the denoiser of `base` is split; its networks may be on the meta device."""
    widths = base.unet.config.block_out_channels
    residuals = [(widths[0], 0)]
    for level, (width, block) in enumerate(zip(widths, base.unet.down_blocks, strict=True)):
        residuals += [(width, level)] * len(block.resnets)
        residuals += [(width, level + 1)] * (block.downsamplers is not None)
    last = base.unet.up_blocks[-1].resnets
    return UnetSplit(
        residuals=(*residuals, (widths[-1], len(widths) - 1)),
        outer=len(last),
        feature=last[0].in_channels - widths[0],
    )


def _hint(base: Base, edges: torch.Tensor) -> torch.Tensor:
    hint: torch.Tensor = base.controlnet.controlnet_cond_embedding(edges)
    return hint


def _residuals(
    base: Base,
    latent: torch.Tensor,
    hint: torch.Tensor,
    timestep: torch.Tensor,
    kv_control: torch.Tensor,
    control_scale: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    control = base.control(latent, timestep, packed_kv(kv_control), hint, control_scale)  # type: ignore[arg-type]
    return (*control["down_block_additional_residuals"], control["mid_block_additional_residual"])


def _whole_unet(
    base: Base, latent: torch.Tensor, timestep: torch.Tensor, kv_unet: torch.Tensor, *residuals: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The U-Net's eps [G, B, 4, h, w], and the input of its last up block, [G, B, C, h, w]."""
    guidance, batch = kv_unet.shape[:2]  # len() would fix it in the traced graph
    *down, mid = (_repeat(residual, guidance) for residual in residuals)
    features = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        features.append(kwargs["hidden_states"].unflatten(0, (guidance, batch)))
        # What the graph gives is what its last block takes, so that `unet_outer` can be cut out.
        return args, {**kwargs, "hidden_states": features[0].flatten(0, 1)}

    last: Any = base.unet.up_blocks[-1]
    with last.register_forward_pre_hook(keep, with_kwargs=True):
        rows = base.eps(
            *(_repeat(latent, guidance), _repeat(timestep, guidance), packed_kv(kv_unet.flatten(0, 1))),
            residuals={"down_block_additional_residuals": down, "mid_block_additional_residual": mid},
        )
    return rows.unflatten(0, (guidance, batch)), features[0]


def _denoiser(
    base: Base,
    latent: torch.Tensor,
    hint: torch.Tensor,
    timestep: torch.Tensor,
    kv_unet: torch.Tensor,
    kv_control: torch.Tensor,
    control_scale: torch.Tensor,
) -> torch.Tensor:
    return _whole_unet(
        base, latent, timestep, kv_unet, *_residuals(base, latent, hint, timestep, kv_control, control_scale)
    )[0]


def _repeat(rows: torch.Tensor, guidance: int) -> torch.Tensor:
    """[B, …] → [G·B, …]."""
    return rows.unsqueeze(0).expand(guidance, *rows.shape).flatten(0, 1)


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


def head_groups(name: str, heads: int, levels: int, side: int) -> int:
    """The number of groups of heads of a self-attention with which its scores fit into `SCORES_LIMIT`.

    Args:
        name: module path, e.g. ``up_blocks.3.attentions.0.transformer_blocks.0.attn1``.
        levels: levels of the network; each halves the side.
        side: of the native latent, in cells.
    """
    block, index, *_ = name.split(".")
    deepest = levels - 1
    level = {"down_blocks": int(index), "up_blocks": deepest - int(index)} if index.isdecimal() else {}
    tokens = (side >> level.get(block, deepest)) ** 2
    scores = 2 * heads * tokens**2 * 4  # two guidance rows, float32
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (scores / n <= SCORES_LIMIT or n == heads))


def split_attention(network: Any, side: int) -> None:
    """Let self-attentions of `network` that need it compute a few heads at a time."""
    levels = len(network.config.block_out_channels)
    for name, module in network.named_modules():
        if isinstance(module, Attention) and not module.is_cross_attention:
            groups = head_groups(name, module.heads, levels, side)
            if groups > 1:
                module.set_processor(SplitProcessor(groups))


_GRAPHS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    VAE_ENCODER: (("autoencoder",), Base.encode),
    CONTROLNET_COND: (("controlnet",), _hint),
    DENOISER: (("unet", "controlnet"), _denoiser),
    VAE_DECODER: (("autoencoder",), Base.decode),
    CONTROLNET: (("controlnet",), _residuals),
    UNET_FULL: (("unet",), _whole_unet),
}
"""The networks that a graph is made of, and what it computes with a base of them."""


class _GraphModule(nn.Module):
    def __init__(self, base: Base, name: str) -> None:
        super().__init__()
        self.networks, self._compute = _GRAPHS[name]
        self._base = copy.copy(base)
        for network in self.networks:
            shared = {id(tensor): tensor for tensor in getattr(base, network).state_dict(keep_vars=True).values()}
            own = copy.deepcopy(getattr(base, network), shared)
            if name not in (VAE_ENCODER, CONTROLNET_COND, VAE_DECODER):  # which have no keys and values
                split_attention(own, base.config.size // geometry(base).factor)
                if network == "controlnet":  # which takes hint features, where it takes edges
                    own.controlnet_cond_embedding = nn.Identity()
            setattr(self._base, network, own)
            setattr(self, network, own)  # under the name that its weights have

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._compute(self._base, *inputs)


def graph_module(base: Base, name: str) -> nn.Module:
    """The module of the graph `name`, made of copies of the networks of `base`, which share its weights.

    It takes the inputs of the graph's spec (`lsast_engines.bundle.graph_spec`) in their order, and gives its outputs.
    """
    return _GraphModule(base, name).eval()
