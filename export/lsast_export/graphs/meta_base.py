"""A base without its weights: enough to trace its graphs, to lay out its keys and values, and to bake styles.

Of a Stable Diffusion 1.5 of 5.2 GB only the projections that baking needs are ever loaded, 112 MB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lsast_train.base.attention import cross_attention_layers
from lsast_train.base.base import Base, BaseParts

NETWORKS = ("unet", "controlnet", "autoencoder")
"""The networks that the graphs are made of."""


def skeleton(parts: BaseParts, **loaded: Any) -> Base:
    """The base of `parts`, its networks on torch's meta device: shapes without memory.

    Args:
        parts: the base.
        loaded: networks that are in memory, by the name of `Base`'s field.
    """
    empty = {name: parts.networks[name]().on_meta() for name in NETWORKS if name not in loaded}
    return Base(parts.facts, parts.fingerprint, null_context=parts.null_context, **{**empty, **loaded})


def baking_base(parts: BaseParts) -> Base:
    """A skeleton whose cross-attentions have their projections to keys and values, in float32."""
    base = skeleton(parts)
    for name in ("unet", "controlnet"):
        tensors = parts.networks[name]().tensors
        for layer in cross_attention_layers(getattr(base, name)):
            for projection in ("to_k", "to_v"):
                linear = getattr(layer.module, projection)
                for key in dict(linear.named_parameters()):
                    # A copy: a view would keep the whole file mapped.
                    value = tensors[f"{layer.name}.{projection}.{key}"].to(torch.float32, copy=True)
                    setattr(linear, key, nn.Parameter(value, requires_grad=False))
    return base


def text_base(parts: BaseParts) -> Base:
    """A skeleton with its text encoder, where the base has one: what embeddings are bound with."""
    has_encoder = "text_encoder" in parts.networks
    return skeleton(parts, **({"text_encoder": parts.load("text_encoder")} if has_encoder else {}))
