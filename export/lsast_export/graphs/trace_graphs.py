"""Traces the graphs of a base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from lsast_engines.bundle.graph_spec import (
    CONTROLNET,
    CONTROLNET_COND,
    DENOISER,
    REQUIRED_GRAPHS,
    UNET_FULL,
    UNET_OUTER,
    VAE_DECODER,
    VAE_ENCODER,
    graph_specs,
    split_specs,
)
from lsast_train.base.base import Base
from lsast_train.base.kv_packing import skip_cond_embedding

from ..progress import Progress, no_progress
from .modules import ControlNetCondGraph, DenoiserGraph, VaeDecoderGraph, VaeEncoderGraph, geometry, split_attention
from .trace import TracedGraph, trace
from .unet_parts import ControlNetGraph, UnetFullGraph, UnetOuterGraph, unet_split

_MODULES: dict[str, Callable[[Base], nn.Module]] = {
    VAE_ENCODER: VaeEncoderGraph,
    CONTROLNET_COND: ControlNetCondGraph,
    DENOISER: DenoiserGraph,
    VAE_DECODER: VaeDecoderGraph,
    CONTROLNET: ControlNetGraph,
    UNET_FULL: UnetFullGraph,
    UNET_OUTER: UnetOuterGraph,
}

_NETWORKS = {DENOISER: ("unet", "controlnet"), CONTROLNET: ("controlnet",), UNET_FULL: ("unet",), UNET_OUTER: ("unet",)}
"""Networks of a graph that have attention."""


@contextlib.contextmanager
def graph_module(base: Base, name: str) -> Iterator[nn.Module]:
    """The module of the graph `name`; the networks of `base` are changed for it while the block runs."""
    networks = _NETWORKS.get(name, ())
    with contextlib.ExitStack() as stack:
        for network in networks:
            side = base.config.size // geometry(base).factor
            stack.enter_context(split_attention(getattr(base, network), side))
        if "controlnet" in networks:
            stack.enter_context(skip_cond_embedding(base.controlnet))
        yield _MODULES[name](base).eval()


def trace_graphs(
    base: Base, names: Sequence[str] = REQUIRED_GRAPHS, progress: Progress = no_progress
) -> dict[str, TracedGraph]:
    """Trace graphs of `base`, which may be on the meta device; the results have no weights and fit every storage type.

    Raises:
        ExportError: a graph that torch cannot export, or one with other inputs and outputs than specified.
    """
    widths = geometry(base)
    specs = graph_specs(widths)
    if not specs.keys() >= set(names):
        specs |= split_specs(widths, unet_split(base))
    traced = {}
    for name in names:
        progress(f"tracing {name}")
        with graph_module(base, name) as module:
            traced[name] = trace(module, specs[name], base.config.multiple, widths.factor)
    return traced
