"""The minimum and maximum of a graph's activations while it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from lsast_engines.backends.imports import import_library

from .calibration_runs import Feeds
from .fold_weights import Model

MinMax = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Minimum and maximum: numbers, or [C] each for activations that are observed by channel."""

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
        values = dict(
            zip(
                [*self._outputs, *ends],
                self._session.run([*self._outputs, *ends], dict(feeds)),
                strict=True,
            )
        )
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
