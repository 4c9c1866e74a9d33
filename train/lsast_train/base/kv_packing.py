"""Packed keys and values: how those of all cross-attentions of a network lie in one row.

A cross-attention sees its context c only as K = W_k c and V = W_v c. Those of all layers are packed along the last
axis, ``K_0 | V_0 | K_1 | V_1 | …``, in the order of `cross_attention_layers`. A style file holds such rows, and
`lsast_train.base.attention.packed_kv` gives one to a network in place of contexts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lsast_engines.bundle.manifest import AttentionLayer

from .attention import GROUPS, cross_attention_layers
from .base import Base


@dataclass(frozen=True)
class KVLayout:
    """The cross-attentions of one network and where each finds its columns."""

    network: nn.Module
    entries: tuple[AttentionLayer, ...]

    @property
    def width(self) -> int:
        """Columns of a packed row."""
        return sum(2 * layer.width for layer in self.entries)

    def weight(self, layer: AttentionLayer, matrix: str) -> torch.Tensor:
        """The matrix ``to_k`` or ``to_v`` of a layer."""
        linear: Any = self.network.get_submodule(f"{layer.name}.{matrix}")
        weight: torch.Tensor = linear.weight
        return weight

    def project(self, contexts: torch.Tensor) -> torch.Tensor:
        """Contexts [N, 3, T, dim], groups in the order of `GROUPS`, to packed keys and values [N, T, width]."""
        return project_kv(self.entries, contexts, self.weight)


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
    unet, control = (KVLayout(net, tuple(cross_attention_layers(net))) for net in (base.unet, base.controlnet))
    return unet, control
