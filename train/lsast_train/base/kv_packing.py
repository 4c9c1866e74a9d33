"""Packed keys and values: how those of all cross-attentions of a network lie in one row, and networks that read them.

A cross-attention sees its context c only as K = W_k c and V = W_v c. Those of all layers are packed along the last
axis, ``K_0 | V_0 | K_1 | V_1 | …``, in the order of `cross_attention_layers`: a style file holds them so, and a baked
network takes them in place of contexts. What is changed in a network is changed by context managers that put it back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lsast_engines.bundle.manifest import AttentionLayer, Network

from .attention import GROUPS, CrossAttentionLayer, attend, cross_attention_layers
from .base import Base


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


@dataclass(eq=False)
class KeyValueBox:
    """The packed keys and values [B, T, width] of the coming call; an object, since torch.export replaces lists."""

    packed: torch.Tensor | None = None


class BakedProcessor:
    """Attention processor that reads keys and values from a box instead of projecting a context."""

    def __init__(self, box: KeyValueBox, offset: int, width: int) -> None:
        self.box = box
        self.key = slice(offset, offset + width)
        self.value = slice(offset + width, offset + 2 * width)

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Run `attn` on `hidden_states` [B, N, C]; the context it is handed does not matter."""
        packed = self.box.packed
        assert packed is not None, "the box is filled before the network runs"
        return attend(attn, hidden_states, packed[:, :, self.key], packed[:, :, self.value])


@contextlib.contextmanager
def baked_attention(layout: PackedLayers, box: KeyValueBox) -> Iterator[None]:
    """Let the cross-attentions of `layout` read from `box`; their processors are put back at the end."""
    before = [layer.module.processor for layer in layout.layers]
    try:
        for layer, entry in zip(layout.layers, layout.entries, strict=True):
            layer.module.set_processor(BakedProcessor(box, entry.offset, entry.width))
        yield
    finally:
        for layer, processor in zip(layout.layers, before, strict=True):
            layer.module.set_processor(processor)


@contextlib.contextmanager
def hint_bypassed(controlnet: Any) -> Iterator[None]:
    """Let `controlnet` take hint features where it took edges; its hint encoder is put back at the end."""
    encoder = controlnet.controlnet_cond_embedding
    controlnet.controlnet_cond_embedding = nn.Identity()
    try:
        yield
    finally:
        controlnet.controlnet_cond_embedding = encoder
