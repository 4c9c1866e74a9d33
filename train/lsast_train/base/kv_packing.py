"""Packed keys and values: how those of all cross-attentions of a network lie in one row.

A cross-attention sees its context c only as K = W_k c and V = W_v c. Those of all layers are packed along the last
axis, ``K_0 | V_0 | K_1 | V_1 | …``, in the order of `cross_attention_layers`. A style file holds such rows, and
`lsast_train.base.attention.packed_kv` gives one to a network in place of contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lsast_engines.bundle.manifest import AttentionLayer, Network

from .attention import GROUPS, CrossAttentionLayer, cross_attention_layers
from .base import Base


@dataclass(frozen=True)
class KVLayout:
    """The cross-attentions of one network and where each finds its columns."""

    layers: tuple[CrossAttentionLayer, ...]
    entries: tuple[AttentionLayer, ...]
    """The manifest's description of each layer, in the same order."""
    width: int
    """Columns of a packed row."""

    @classmethod
    def of(cls, network: nn.Module, name: Network) -> KVLayout:
        """The layout of `network`, without gaps."""
        layers = tuple(cross_attention_layers(network))
        entries = tuple(AttentionLayer(layer.name, name, layer.group, layer.offset, layer.width) for layer in layers)
        return cls(layers, entries, sum(2 * layer.width for layer in layers))

    def project(self, contexts: torch.Tensor) -> torch.Tensor:
        """Contexts [N, 3, T, dim], groups in the order of `GROUPS`, to packed keys and values [N, T, width]."""
        modules = {layer.name: layer.module for layer in self.layers}
        return project_kv(self.entries, contexts, lambda layer, matrix: getattr(modules[layer.name], matrix).weight)


def project_kv(
    layers: Iterable[AttentionLayer], contexts: torch.Tensor, weight: Callable[[AttentionLayer, str], torch.Tensor]
) -> torch.Tensor:
    """Packed keys and values [N, T, width] of `contexts`.

    Args:
        layers: of one network, in the order of their columns.
        contexts: [N, 3, T, dim], groups in the order of `GROUPS`.
        weight: the matrix ``to_k`` or ``to_v`` of a layer, in the dtype of `contexts`.
    """
    parts = []
    for layer in layers:
        context = contexts[:, GROUPS.index(layer.group)]  # [N, T, dim]
        parts += [F.linear(context, weight(layer, matrix)) for matrix in ("to_k", "to_v")]
    return torch.cat(parts, dim=-1)


def kv_layouts(base: Base) -> tuple[KVLayout, KVLayout]:
    """The layouts of the base's U-Net and ControlNet."""
    return KVLayout.of(base.unet, "unet"), KVLayout.of(base.controlnet, "control")
