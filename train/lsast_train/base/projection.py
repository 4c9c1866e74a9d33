"""Contexts become keys and values.

A cross-attention sees its context c only as K = W_k c and V = W_v c. Those of all layers of a network are packed along
the last axis, ``K_0 | V_0 | K_1 | V_1 | …``, in the order of `attention.cross_attention_layers`; a style file holds
such rows. This needs the matrices only. diffusers is not imported here, nor by what bakes a style: that would take
longer than baking.
"""

from collections.abc import Callable, Iterable
from typing import get_args

import torch
import torch.nn.functional as F

from lsast_engines.bundle.manifest import AttentionLayer, Group

GROUPS: tuple[Group, ...] = get_args(Group)
"""The layer groups in the order of the prompt space's group axis."""


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
