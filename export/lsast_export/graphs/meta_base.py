"""A base without its weights: enough to trace its graphs and to lay out its keys and values."""

from __future__ import annotations

from typing import Any

from lsast_train.base.base import Base, build_base
from lsast_train.base.lazy_base import LazyBase

NETWORKS = ("unet", "controlnet", "autoencoder")
"""The networks that the graphs are made of."""


def base_on_meta(parts: LazyBase, **loaded: Any) -> Base:
    """The base of `parts`, its networks on torch's meta device: shapes without memory.

    Args:
        parts: the base.
        loaded: networks that are in memory, by the name of `Base`'s field.
    """
    empty = {name: parts.networks[name]().on_meta() for name in NETWORKS if name not in loaded}
    return build_base(parts.config, parts.fingerprint, null_context=parts.null_context, **{**empty, **loaded})
