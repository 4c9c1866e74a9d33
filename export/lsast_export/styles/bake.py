"""Baking: prompts projected through every cross-attention, once, so that no context exists at run time.

A cross-attention sees its context c only as K = W_k c and V = W_v c. Both depend on the style and the stage, not on
the picture or the step, so a style *is* its keys and values. Those of all layers of a network are packed along the
last axis, ``K_0 | V_0 | K_1 | V_1 | …``, in the order of `cross_attention_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lsast_engines.bundle.manifest import AttentionLayer
from lsast_engines.bundle.style import Style
from lsast_engines.errors import StyleError, fault_list
from lsast_train.base.attention import GROUPS
from lsast_train.base.base import Base
from lsast_train.base.kv_packing import PackedLayers, pack

NULL_STYLE = "null"
"""Name of the unconditional style, the row 0 of classifier-free guidance."""


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
