"""Cross-attention whose context is chosen by layer group.

diffusers hands one text context to every block of a U-Net. LSAST needs three: one for the encoder (`down`), one for
the middle (`mid`) and one for the decoder (`up`) (docs/method.md §1.4). Processors read them from a `ContextBox` that
is
filled just before the call. The box is an object, not a list attribute, because torch.export replaces lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

Group = Literal["down", "mid", "up"]
"""Layer group of a cross-attention: encoder, middle or decoder of the U-Net (ControlNet has no decoder)."""

GROUPS: tuple[Group, ...] = get_args(Group)
"""The layer groups in the order of the prompt space's group axis."""

Contexts: TypeAlias = torch.Tensor | Sequence[torch.Tensor]
"""Contexts of all layer groups: [B, 3, tokens, dim], or three of [B, tokens, dim], in the order of `GROUPS`. Apart, a
group whose context is constant leaves no trace for the way back."""

_PREFIXES: dict[str, Group] = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass(eq=False)
class ContextBox:
    """The contexts of the coming call, by group; each [B, tokens, dim]."""

    down: torch.Tensor | None = None
    mid: torch.Tensor | None = None
    up: torch.Tensor | None = None

    def fill(self, contexts: Contexts) -> None:
        """Take the contexts of all groups."""
        self.down, self.mid, self.up = contexts.unbind(1) if isinstance(contexts, torch.Tensor) else contexts


@dataclass(frozen=True)
class CrossAttentionLayer:
    """One cross-attention of a network, in the order in which the forward pass meets them."""

    name: str
    """Module path, e.g. ``down_blocks.0.attentions.0.transformer_blocks.0.attn2``."""
    group: Group
    module: Attention

    @property
    def width(self) -> int:
        """Channels of the keys (and of the values)."""
        return int(self.module.to_k.out_features)


def cross_attention_layers(network: nn.Module) -> list[CrossAttentionLayer]:
    """All cross-attention layers of a diffusers U-Net or ControlNet: down, mid, up, each in module order.

    Blocks built with ``only_cross_attention`` attend to the context in ``attn1`` too, so the module is asked,
    not its name.
    """
    layers = [
        CrossAttentionLayer(name, _PREFIXES[name.split(".", 1)[0]], module)
        for name, module in network.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention
    ]
    return sorted(layers, key=lambda layer: GROUPS.index(layer.group))  # stable: module order within a group


def attend(attn: Attention, hidden: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention of `hidden` [B, N, C] over projected `key`, `value` [B, T, W] → [B, N, C]."""
    query = attn.to_q(hidden)
    batch, _, width = query.shape
    heads = attn.heads
    # [B, N, W] → [B, heads, N, W/heads]
    query, key, value = (x.view(batch, -1, heads, width // heads).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
    mixed = mixed.transpose(1, 2).reshape(batch, -1, width)
    out: torch.Tensor = attn.to_out[1](attn.to_out[0](mixed))
    return out


class GroupedProcessor:
    """Attention processor: self-attention as usual, cross-attention over the group's context in the box."""

    def __init__(self, box: ContextBox, group: Group) -> None:
        self.box = box
        self.group = group

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Run `attn` on `hidden_states` [B, N, C]."""
        source = hidden_states if encoder_hidden_states is None else getattr(self.box, self.group)
        return attend(attn, hidden_states, attn.to_k(source), attn.to_v(source))


def install_grouped_attention(network: nn.Module) -> ContextBox:
    """Give every attention of `network` a `GroupedProcessor`; returns the box they share."""
    box = ContextBox()
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            module.set_processor(GroupedProcessor(box, _PREFIXES[name.split(".", 1)[0]]))
    return box
