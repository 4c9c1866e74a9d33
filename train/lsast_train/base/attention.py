"""Cross-attention whose context is chosen by layer group.

diffusers gives one context to every block of a U-Net. LSAST needs three: for the encoder (`down`), the middle (`mid`)
and the decoder (`up`) (docs/method.md §1.4). They reach the attention processors through diffusers'
``cross_attention_kwargs`` (`layer_contexts`), as do keys and values that were projected beforehand (`packed_kv`).
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.models.attention_processor import Attention
from torch import nn

from lsast_engines.bundle.manifest import AttentionLayer, Group, Network

from .projection import GROUPS, project_kv

Contexts: TypeAlias = torch.Tensor | Sequence[torch.Tensor]
"""Contexts of all layer groups: [B, 3, T, dim], or three of [B, T, dim], in the order of `GROUPS`. Three tensors keep
nothing for the backward pass of a group whose context is constant."""

_GROUP_OF: dict[str, Group] = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


def cross_attention_layers(network: nn.Module) -> list[AttentionLayer]:
    """All cross-attention layers of a diffusers U-Net or ControlNet: down, mid, up, each in module order.

    Their packed keys and values lie one after the other, without gaps.
    """
    kind: Network = "control" if isinstance(network, ControlNetModel) else "unet"
    found = [
        (_GROUP_OF[name.partition(".")[0]], name, int(module.to_k.out_features))
        for name, module in network.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention  # with ``only_cross_attention`` also an attn1
    ]
    layers: list[AttentionLayer] = []
    offset = 0
    for group, name, width in sorted(found, key=lambda layer: GROUPS.index(layer[0])):  # stable within a group
        layers.append(AttentionLayer(name, kind, group, offset, width))
        offset += 2 * width
    return layers


class _LayerwiseProcessor:
    """Attention processor: cross-attention of `layer` over its group's context or over packed K and V; self-attention
    without a layer."""

    def __init__(self, layer: AttentionLayer | None) -> None:
        self.layer = layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        contexts: Sequence[torch.Tensor] | None = None,
        kv: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Run `attn` on `hidden_states` [B, N, C]; `contexts` and `kv` are those of `layer_contexts`, `packed_kv`."""
        if self.layer is not None and kv is not None:
            middle, end = self.layer.offset + self.layer.width, self.layer.offset + 2 * self.layer.width
            key, value = kv[:, :, self.layer.offset : middle], kv[:, :, middle:end]
        else:
            source = hidden_states
            if self.layer is not None:
                assert contexts is not None, "a network of a `Base` is called with cross_attention_kwargs"
                source = contexts[GROUPS.index(self.layer.group)]
            key, value = attn.to_k(source), attn.to_v(source)
        query = attn.to_q(hidden_states)
        (batch, _, width), heads = query.shape, attn.heads
        # [B, N, W] → [B, heads, N, W/heads]
        query, key, value = (x.view(batch, -1, heads, width // heads).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        mixed = mixed.transpose(1, 2).reshape(batch, -1, width)
        out: torch.Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return out


def set_layerwise_processors(network: nn.Module) -> None:
    """Let every attention of a diffusers U-Net or ControlNet take the contexts or packed K and V of its layer group."""
    cross = {layer.name: layer for layer in cross_attention_layers(network)}
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            module.set_processor(_LayerwiseProcessor(cross.get(name)))


def layer_contexts(contexts: Contexts) -> dict[str, Any]:
    """The ``cross_attention_kwargs`` that give each layer group its context."""
    return {"contexts": contexts.unbind(1) if isinstance(contexts, torch.Tensor) else tuple(contexts)}


def packed_kv(kv: torch.Tensor) -> dict[str, Any]:
    """The ``cross_attention_kwargs`` that give every layer its part of the packed keys and values [B, T, width]."""
    return {"kv": kv}


def project_contexts(network: nn.Module, contexts: torch.Tensor) -> torch.Tensor:
    """Packed keys and values [N, T, width] of `contexts`, as of `project_kv`, in a U-Net or ControlNet."""

    def weight(layer: AttentionLayer, matrix: str) -> torch.Tensor:
        return network.get_parameter(f"{layer.name}.{matrix}.weight")

    return project_kv(cross_attention_layers(network), contexts, weight)
