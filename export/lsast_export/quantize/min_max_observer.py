"""What the activations of a graph reach while it runs: their least and greatest values, and nothing more leaves it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from .calibration_runs import Feeds
from .fold_weights import Model

MinMax = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Least and greatest values: numbers, or [C] each where channels are told apart."""

_LOW, _HIGH = "/low", "/high"
"""Behind the name of an activation: its least and its greatest value."""


class MinMaxObserver:
    """A graph on ONNX Runtime that is called like an engine, and notes what activations reach over all calls."""

    def __init__(self, model: Model, folder: Path, channels: Mapping[str, int | None]) -> None:
        """Open `model`.

        Args:
            model: opset 18 or later; it stays as it is.
            folder: of its weights, where they lie in a file; the graph with its further outputs is written there and
                removed again.
            channels: activations by name, with the length of their last axis where its places are told apart.
        """
        import onnxruntime

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
        float_layers = [name + end for name in self._names for end in (_LOW, _HIGH)]
        values = dict(
            zip(
                [*self._outputs, *float_layers],
                self._session.run([*self._outputs, *float_layers], dict(feeds)),
                strict=True,
            )
        )
        for name in float_layers:
            further, seen = np.minimum if name.endswith(_LOW) else np.maximum, self._found.get(name)
            self._found[name] = values[name] if seen is None else further(seen, values[name])
        return {name: values[name] for name in self._outputs}

    @property
    def reach(self) -> dict[str, MinMax]:
        """What was noted, by activation."""
        return {name: (self._found[name + _LOW], self._found[name + _HIGH]) for name in self._names}


def _observed(model: Model, channels: Mapping[str, int | None]) -> Model:
    """`model` with the ends of activations as further outputs."""
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
