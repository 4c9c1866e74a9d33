"""How many multiplications a graph asks for at given input shapes, counted without running it.

OpenVINO reads the ONNX file, is told the shapes, and says what shape every operation then has; weights are never
loaded. What counts is what `torch.utils.flop_counter` counts, at half its number: products and convolutions, the latter
as they are defined, however a backend computes them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsast_engines.backends.base import import_library
from lsast_engines.backends.openvino import shared_core
from lsast_engines.errors import MissingExtraError

Shapes = Mapping[str, Sequence[int]]
"""Lengths of the axes of every input, by its name."""


def count_macs(path: Path, shapes: Sequence[Shapes]) -> list[int]:
    """Multiply-accumulates of one run of the graph in `path`, for each set of input shapes.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    try:
        openvino = import_library("openvino")
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    model = shared_core(openvino).read_model(path)
    counts = []
    for inputs in shapes:
        model.reshape({name: list(lengths) for name, lengths in inputs.items()})
        counts.append(sum(_macs(operation) for operation in model.get_ops()))
    return counts


def _macs(operation: Any) -> int:
    """Multiply-accumulates of one operation, whose shapes are known."""
    kind = operation.get_type_name()
    if kind == "MatMul":
        left = list(operation.input(0).get_shape())
        # A factor of one axis is a vector, which is not transposed.
        turned = operation.get_attributes()["transpose_a"] and len(left) > 1
        each = left[-2] if turned else left[-1]
    elif kind in ("Convolution", "GroupConvolution"):
        # [outputs, inputs, …], in groups [groups, outputs, inputs, …], of one group
        each = math.prod(list(operation.input(1).get_shape())[1 if kind == "Convolution" else 2 :])
    else:
        return 0
    return int(each * math.prod(operation.output(0).get_shape()))
