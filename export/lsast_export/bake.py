"""Baking: prompts projected through every cross-attention, once, so that no context exists at run time.

A cross-attention sees its context c only as K = W_k c and V = W_v c. Both depend on the style and the stage, not on
the picture or the step, so a style *is* its keys and values. Those of all layers of a network are packed along the
last axis, ``K_0 | V_0 | K_1 | V_1 | …``, in the order of `cross_attention_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lsast_engines.errors import StyleError, fault_list
from lsast_engines.manifest import AttentionLayer, Network
from lsast_engines.style import Style
from lsast_train.attention import GROUPS, CrossAttentionLayer, cross_attention_layers
from lsast_train.base import Base

NULL_STYLE = "null"
"""Name of the unconditional style, the row 0 of classifier-free guidance."""


@dataclass(frozen=True)
class PackedLayers:
    """The cross-attentions of one network and where each finds its columns."""

    layers: tuple[CrossAttentionLayer, ...]
    entries: tuple[AttentionLayer, ...]
    """What the manifest says of each layer, in the same order."""
    width: int
    """Columns of a packed row."""

    @classmethod
    def of(cls, network: nn.Module, name: Network) -> PackedLayers:
        """Lay out the cross-attentions of `network` without gaps."""
        layers = cross_attention_layers(network)
        entries, offset = [], 0
        for layer in layers:
            entries.append(AttentionLayer(layer.name, name, layer.group, offset, layer.width))
            offset += 2 * layer.width
        return cls(tuple(layers), tuple(entries), offset)

    def project(self, contexts: torch.Tensor) -> torch.Tensor:
        """Contexts [N, 3, T, dim], groups in the order of `GROUPS`, to packed keys and values [N, T, width]."""
        parts = []
        for layer in self.layers:
            context = contexts[:, GROUPS.index(layer.group)]  # [N, T, dim]
            parts += [layer.module.to_k(context), layer.module.to_v(context)]
        return torch.cat(parts, dim=-1)


def pack(base: Base) -> tuple[PackedLayers, PackedLayers]:
    """The layouts of the base's U-Net and ControlNet."""
    return PackedLayers.of(base.unet, "unet"), PackedLayers.of(base.controlnet, "control")


def bake_style(base: Base, prompts: torch.Tensor, name: str, meta: Mapping[str, str] | None = None) -> Style:
    """Project `prompts` [stages, 3, tokens, dim] (groups in the order of `GROUPS`) through `base`.

    Args:
        base: the base with the weights that the bundle holds; the style is bound to its fingerprint.
        prompts: one context for every stage and layer group.
        name: name of the style.
        meta: licence, training facts and the like.

    Raises:
        StyleError: prompts of another shape than the base's contexts, or not finite; all faults at once.
    """
    expected = (len(GROUPS), base.facts.tokens, base.context_dim)
    faults = []
    if prompts.ndim != 4 or tuple(prompts.shape[1:]) != expected or not len(prompts):
        shape = ", ".join(map(str, expected))
        faults.append(f"prompts: found shape {list(prompts.shape)}; expected [stages, {shape}]")
    if not torch.isfinite(prompts).all():
        faults.append("prompts: found NaN or infinite values; train the style again")
    if faults:
        raise StyleError(fault_list(f"style {name!r} cannot be baked:", faults))
    with torch.no_grad():
        unet, control = (layout.project(prompts.to(base.null_context)).cpu().numpy() for layout in pack(base))
    return Style(name, base.fingerprint, len(prompts), base.facts.tokens, unet, control, dict(meta or {}))


def bake_null_style(base: Base) -> Style:
    """The style of the base's null context: one stage, the same for every layer group."""
    prompts = base.null_context.expand(1, len(GROUPS), *base.null_context.shape)
    return bake_style(base, prompts, NULL_STYLE)


def manifest_layers(layouts: Sequence[PackedLayers]) -> tuple[AttentionLayer, ...]:
    """The layers of all `layouts` as the manifest lists them."""
    return tuple(entry for layout in layouts for entry in layout.entries)
