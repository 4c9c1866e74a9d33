"""Calibration: the ranges of a graph's activations while it runs, and the int8 graph that follows from them.

The float32 weights of a graph lie in a file, from which ONNX Runtime maps them, and of an activation only its minimum
and maximum leave the graph: so a graph of Stable Diffusion's size fits into memory.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lsast_engines.backends.base import Array, Engine, import_library
from lsast_engines.bundle.graph_spec import GraphSpec
from lsast_engines.environment import core_limit

from .qdq import Ranges, Span, int8_graph, layers_of
from .smoothquant import Factors, MinMax, find_groups, smooth, smoothing_factors
from .weights import NAME, Model, WeightFile, Weights, fold_weights

_ENDS = ("conv_in.", "conv_out.")
"""Weights of a network's first and last convolution, which stay float: their errors would affect everything."""

_LOW, _HIGH = "/low", "/high"
"""Suffixes of the outputs that hold the minimum and the maximum of an activation."""


class Calibration(Engine):
    """A graph in float32 that records the ranges of its activations while it runs, and can then be smoothed and
    quantized, also when it is closed."""

    backend = "onnxruntime"

    def __init__(self, path: Path, spec: GraphSpec, folder: Path) -> None:
        """Prepare the graph of `path`; its weights go to the empty `folder`, used as long as this object is."""
        super().__init__(spec, "cpu", "fp32")
        self.folder = folder
        with (folder / NAME).open("wb") as file:
            self._model = fold_weights(path, WeightFile(file))
        self._layers = layers_of(self._model)
        self._session: Any = None
        self._min_max: dict[str, MinMax] = {}
        self._smoothed = 0

    @property
    def layers(self) -> list[str]:
        """Names of the nodes that can be quantized, in the order of the graph."""
        return [node.name for node in self._layers]

    @property
    def float_layers(self) -> frozenset[str]:
        """Names of the layers that should stay float: a network's first and last convolution."""
        convolutions = (node for node in self._layers if node.op_type == "Conv")
        return frozenset(node.name for node in convolutions if any(end in node.input[1] for end in _ENDS))

    @property
    def ranges(self) -> Ranges:
        """The recorded ranges of the input and the output of each layer, by the name of its weight."""

        def span(name: str) -> Span:
            low, high = self._min_max[name]
            return float(low.min()), float(high.max())

        return {
            node.input[1]: (span(node.input[0]), span(node.output[0] if node.op_type == "Conv" else node.input[0]))
            for node in self._layers
        }

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        if self._session is None:
            self._min_max, self._session = {}, self._open()
        wanted = [output.name for output in self._session.get_outputs()]
        values = dict(zip(wanted, self._session.run(wanted, {**self._bound, **feeds}), strict=True))
        for name in self._watched():
            low, high = values.pop(name + _LOW), values.pop(name + _HIGH)
            least, most = self._min_max.get(name, (low, high))
            self._min_max[name] = (np.minimum(least, low), np.maximum(most, high))
        return values

    def _release_memory(self) -> None:
        """Nothing is kept between two runs, see `_open`."""

    def _close(self) -> None:
        self._session = None

    def smoothing_factors(self, alpha: float) -> Factors:
        """The factors that smooth the graph (`smoothquant`), by what was recorded."""
        return smoothing_factors(self._model, Weights(self._model, self.folder), self._min_max, alpha)

    def smooth(self, factors: Factors) -> None:
        """Smooth the graph, and what was recorded, by its own factors or those of a graph with the same layers.

        If it runs again, it runs the smoothed graph, and records anew.
        """
        if not factors:
            return
        self._session = None
        # A new file each time: the weights of an earlier smoothing are read while these are written.
        self._smoothed += 1
        with (self.folder / f"smoothed{self._smoothed}.data").open("wb") as file:
            smooth(self._model, Weights(self._model, self.folder), factors, WeightFile(file))
        for group in find_groups(self._model):
            if group.activation in self._min_max:
                low, high = self._min_max[group.activation]
                factor = factors[group.weights[0]]
                self._min_max[group.activation] = (low / factor, high / factor)

    def quantized(self, kept: Collection[str], ranges: Ranges | None = None) -> Model:
        """The graph with every layer in int8 but those of `kept`, whose weights lie in `folder`.

        `ranges` of a graph with the same layers take the place of the recorded ones.
        """
        ranges = self.ranges if ranges is None else ranges
        return int8_graph(self._model, self.folder, ranges, set(self.layers).difference(kept))

    def _watched(self) -> dict[str, int | None]:
        """Activations to observe; inputs of linear layers, by channel, with the number of channels."""
        dims = {tensor.name: tensor.dims for tensor in self._model.graph.initializer}
        watched: dict[str, int | None] = {}
        for node in self._layers:
            if node.op_type == "Conv":
                watched |= dict.fromkeys((node.input[0], node.output[0]))
        return watched | {node.input[0]: dims[node.input[1]][0] for node in self._layers if node.op_type == "MatMul"}

    def _open(self) -> Any:
        """A session of the graph with minimum and maximum of activations as further outputs."""
        onnxruntime = import_library("onnxruntime")
        observed = onnx.ModelProto()
        observed.CopyFrom(self._model)
        graph = observed.graph
        first = "observed/first"
        graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), first))
        for name, count in self._watched().items():
            flat = f"{name}/observed"
            shape = [-1] if count is None else [-1, count]
            graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{flat}/shape"))
            graph.node.append(helper.make_node("Reshape", [name, f"{flat}/shape"], [flat], flat))
            for operator, end in (("ReduceMin", _LOW), ("ReduceMax", _HIGH)):
                graph.node.append(helper.make_node(operator, [flat, first], [name + end], name + end, keepdims=0))
                graph.output.append(helper.make_tensor_value_info(name + end, TensorProto.FLOAT, shape[1:]))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = False  # several graphs are open at once, and an arena keeps its memory
        options.add_session_config_entry("session.force_spinning_stop", "1")  # they run in turns
        options.intra_op_num_threads = core_limit() or 0
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".onnx") as file:
            onnx.save_model(observed, file.name)
            return onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
