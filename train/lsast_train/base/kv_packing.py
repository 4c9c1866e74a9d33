"""Packed keys and values: how those of all cross-attentions of a network lie in one row.

A cross-attention sees its context c only as K = W_k c and V = W_v c. Those of all layers are packed along the last
axis, ``K_0 | V_0 | K_1 | V_1 | …``, in the order of `cross_attention_layers`. A style file holds such rows, and
`lsast_train.base.attention.packed_kv` gives one to a network in place of contexts.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lsast_engines.bundle.manifest import AttentionLayer

from .attention import GROUPS, cross_attention_layers


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


def project_contexts(network: nn.Module, contexts: torch.Tensor) -> torch.Tensor:
    """Packed keys and values [N, T, width] of `contexts`, as of `project_kv`, in a U-Net or ControlNet."""

    def weight(layer: AttentionLayer, matrix: str) -> torch.Tensor:
        linear: Any = network.get_submodule(f"{layer.name}.{matrix}")
        found: torch.Tensor = linear.weight
        return found

    return project_kv(cross_attention_layers(network), contexts, weight)
