"""Calibration: the ranges of a graph's activations while it runs, and the int8 graph that follows from them.

The float32 weights of a graph lie in a file, from which ONNX Runtime maps them, and of an activation only its minimum
and maximum leave the graph: so a graph of Stable Diffusion's size fits into memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from lsast_engines.backends.base import import_library

from .calibration_runs import Feeds
from .qdq import LayerRange, Ranges, Span, int8_graph, layers_of
from .smoothquant import Factors, MinMax, find_groups, smooth, smoothing_factors
from .weights import Model, Node, WeightFile, Weights, fold_weights

_ENDS = ("conv_in.", "conv_out.")
"""Weights of a network's first and last convolution, which stay float: their errors would affect everything."""

_LOW, _HIGH = "/low", "/high"
"""Suffixes of the outputs that hold the minimum and the maximum of an activation."""


class MinMaxObserver:
    """A graph on ONNX Runtime, called like an engine, that records the range of activations over all calls."""

    def __init__(self, model: Model, folder: Path, channels: Mapping[str, int | None]) -> None:
        """Open `model`.

        Args:
            model: opset 18 or later; it is not changed.
            folder: of its weights, if they lie in a file; the graph with the further outputs is written there and
                removed again.
            channels: names of activations; with the length of the last axis for those that are observed by channel.
        """
        onnxruntime = import_library("onnxruntime")
        self._outputs = [value.name for value in model.graph.output]
        self._found: dict[str, npt.NDArray[np.float32]] = {}
        self._names = list(channels)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        options.enable_mem_pattern = False
        with tempfile.NamedTemporaryFile(dir=folder, prefix="observed.", suffix=".onnx") as file:
            onnx.save_model(_observed(model, channels), file.name)
            self._session: Any = onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Feeds:
        """The graph's outputs, by name."""
        ends = [name + end for name in self._names for end in (_LOW, _HIGH)]
        wanted = [*self._outputs, *ends]
        values = dict(zip(wanted, self._session.run(wanted, dict(feeds)), strict=True))
        for name in ends:
            further, seen = np.minimum if name.endswith(_LOW) else np.maximum, self._found.get(name)
            self._found[name] = values[name] if seen is None else further(seen, values[name])
        return {name: values[name] for name in self._outputs}

    @property
    def min_max(self) -> dict[str, MinMax]:
        """Minimum and maximum of each activation, by name."""
        return {name: (self._found[name + _LOW], self._found[name + _HIGH]) for name in self._names}


def _observed(model: Model, channels: Mapping[str, int | None]) -> Model:
    """`model` with minimum and maximum of activations as further outputs."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    graph = observed.graph
    first = "observed/first"
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), first))
    for name, count in channels.items():
        flat = f"{name}/observed"
        shape = [-1] if count is None else [-1, count]
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{flat}/shape"))
        graph.node.append(helper.make_node("Reshape", [name, f"{flat}/shape"], [flat], flat))
        for operator, end in (("ReduceMin", _LOW), ("ReduceMax", _HIGH)):
            graph.node.append(helper.make_node(operator, [flat, first], [name + end], name + end, keepdims=0))
            graph.output.append(
                helper.make_tensor_value_info(name + end, TensorProto.FLOAT, [] if count is None else [count])
            )
    return observed


class Calibration:
    """A graph in float32 that records the ranges of its activations while it runs.

    Call it like an engine, then `close` it; after that it can be smoothed and quantized.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        """Prepare the graph of `path` (`fold_weights`).

        Args:
            folder: an empty folder for its weights, which must exist as long as this object is used.
        """
        self.folder = folder
        with WeightFile(folder) as weights:
            self._model = fold_weights(path, weights.tensor)
        self.layers = layers_of(self._model)
        """Names of the nodes that can be quantized, in the order of the graph."""
        self._observer: MinMaxObserver | None = None
        self._min_max: dict[str, MinMax] = {}
        self._ranges: Ranges | None = None
        self._smoothed = 0

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
            self._observer = MinMaxObserver(self._model, self.folder, self._watched())
        return self._observer(feeds)

    def close(self) -> None:
        """Free the memory that running takes; the recorded ranges stay."""
        if self._observer is not None:
            self._min_max, self._observer, self._ranges = self._observer.min_max, None, None

    def smooth(self, alpha: float) -> Factors:
        """Smooth the graph and its ranges (`smoothquant`) by what was recorded: → the factors."""
        factors = smoothing_factors(self._model, self._min_max, alpha, self.folder)
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
        with WeightFile(self.folder, f"smoothed{self._smoothed}.data") as weights:
            smooth(self._model, factors, self.folder, weights.tensor)

    @property
    def float_layers(self) -> frozenset[str]:
        """Names of the layers that should stay float: a network's first and last convolution."""
        nodes = (node for node in self._layer_nodes() if node.op_type == "Conv")
        return frozenset(node.name for node in nodes if any(end in node.input[1] for end in _ENDS))

    def quantized(self, kept: Iterable[str]) -> Model:
        """The graph with every layer in int8 but those of `kept`, whose weights lie in `folder`."""
        return int8_graph(self._model, self.folder, self.ranges, set(self.layers) - set(kept))

    def _layer_nodes(self) -> list[Node]:
        return [node for node in self._model.graph.node if node.name in set(self.layers)]

    def _watched(self) -> dict[str, int | None]:
        """Activations to observe; inputs of linear layers with their number of channels (`MinMaxObserver`)."""
        constants = Weights(self._model, self.folder)
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
