"""Calibration: the ranges of a graph's activations while it runs, and the int8 graph that follows from them.

The float32 weights of a graph lie in a file, from which ONNX Runtime maps them, and of an activation only its minimum
and maximum leave the graph: so a graph of Stable Diffusion's size fits into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .calibration_runs import Feeds
from .fold_weights import Model, Node, Weights, fold_weights
from .min_max_observer import MinMax, MinMaxObserver
from .qdq import LayerRange, Ranges, Span, int8_graph, layers_of
from .smoothquant import Factors, find_groups, smooth, smoothing_factors
from .weight_file import WeightFile

_ENDS = ("conv_in.", "conv_out.")
"""Weights of a network's first and last convolution, which stay float: their errors would affect everything."""


class Calibration:
    """A graph in float32 that records the ranges of its activations while it runs.

    Call it like an engine, then `close` it; after that it can be smoothed and quantized.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        """Prepare the graph of `path` (`fold_weights`).

        Args:
            path: a graph file.
            folder: an empty folder for its weights, which must exist as long as this object is used.
        """
        self._folder = folder
        with WeightFile(folder) as weights:
            self._model = fold_weights(path, weights.tensor)
        self._observer: MinMaxObserver | None = None
        self._min_max: dict[str, MinMax] = {}
        self._ranges: Ranges | None = None
        self._smoothed = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the nodes that can be quantized, in the order of the graph."""
        return layers_of(self._model)

    @property
    def folder(self) -> Path:
        """The folder of the weights."""
        return self._folder

    @property
    def ranges(self) -> Ranges:
        """The ranges of all layers, by the names of their weights: recorded, or set by the caller."""
        if self._ranges is None:
            self._ranges = {weight: LayerRange(*spans) for weight, spans in self._spans().items()}
        return self._ranges

    @ranges.setter
    def ranges(self, found: Ranges) -> None:
        self._ranges = found

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Feeds:
        """The graph's outputs, by name; the ranges of its activations are recorded."""
        if self._observer is None:
            self._observer = MinMaxObserver(self._model, self._folder, self._watched())
        return self._observer(feeds)

    def close(self) -> None:
        """Free the memory that running takes; the recorded ranges stay."""
        if self._observer is not None:
            self._min_max, self._observer, self._ranges = self._observer.min_max, None, None

    def smooth(self, alpha: float) -> Factors:
        """Smooth the graph and its ranges (`smoothquant`) by what was recorded: → the factors."""
        factors = smoothing_factors(self._model, self._min_max, alpha, self._folder)
        for group in find_groups(self._model):
            low, high = self._min_max[group.activation]
            factor = factors[group.weights[0]]
            self._min_max[group.activation] = (low / factor, high / factor)
        self._ranges = None
        self.smooth_by(factors)
        return factors

    def smooth_by(self, factors: Factors) -> None:
        """Smooth the graph by the factors of another one with the same layers, whose ranges are to be used, too."""
        if not factors:
            return
        # A new file each time: the weights of an earlier smoothing are read while these are written.
        self._smoothed += 1
        with WeightFile(self._folder, f"smoothed{self._smoothed}.data") as weights:
            smooth(self._model, factors, self._folder, weights.tensor)

    @property
    def float_layers(self) -> frozenset[str]:
        """Names of the layers that should stay float: a network's first and last convolution."""
        nodes = (node for node in self._layer_nodes() if node.op_type == "Conv")
        return frozenset(node.name for node in nodes if any(end in node.input[1] for end in _ENDS))

    def quantized(self, kept: Iterable[str]) -> Model:
        """The graph with every layer in int8 but those of `kept`, whose weights lie in `folder`."""
        return int8_graph(self._model, self._folder, self.ranges, set(self.layers) - set(kept))

    def _layer_nodes(self) -> list[Node]:
        layers = set(self.layers)
        return [node for node in self._model.graph.node if node.name in layers]

    def _watched(self) -> dict[str, int | None]:
        """Activations to observe; inputs of linear layers with their number of channels (`MinMaxObserver`)."""
        constants = Weights(self._model, self._folder)
        watched: dict[str, int | None] = {}
        for node in self._layer_nodes():
            if node.op_type == "Conv":
                watched |= dict.fromkeys((node.input[0], node.output[0]))
        for node in self._layer_nodes():
            if node.op_type == "MatMul":
                watched[node.input[0]] = constants.shape(node.input[1])[0]
        return watched

    def _spans(self) -> dict[str, tuple[Span, Span]]:
        def span(name: str) -> Span:
            low, high = self._min_max[name]
            return float(low.min()), float(high.max())

        return {
            node.input[1]: (span(node.input[0]), span(node.output[0] if node.op_type == "Conv" else node.input[0]))
            for node in self._layer_nodes()
        }
