"""Weights alone in 8 bits: for memory.

A weight W of a convolution or linear layer becomes int8 numbers q and a scale s for each output channel,
s = max |W| / 127, q = round(W / s) (symmetric: no zero point), and `DequantizeLinear` gives s q to whatever took W.
Convolutions compute in float32. What a linear layer computes in is the backend's choice: ONNX Runtime 1.32 makes it a
MatMulNBits that rounds the other factor to 8 bits too, in groups of 32 numbers as they come; OpenVINO does alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from .plain_graph import Model, Node, Weights, replace_contents

SMALLEST = 1 << 12
"""Weights of fewer numbers are left as they are: they save nothing."""


def quantise_weights(path: Path, kept: frozenset[str]) -> Model:
    """The graph of `path` with weights in int8; those that stay refer to where they lay.

    Args:
        path: a graph file of a bundle.
        kept: names of layers (nodes) whose weights stay.
    """
    model = onnx.load(str(path), load_external_data=False)
    weights = Weights(model, path.parent)
    makers = {output: node for node in model.graph.node for output in node.output}
    heads: dict[int, list[Node]] = {}
    tensors = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.name in kept:
            continue
        trail, name = _origin(node.input[1], makers)
        if name not in weights:
            continue
        array = weights[name]
        if array.size < SMALLEST:
            continue
        array = array.astype(np.float32)
        for step in reversed(trail):
            if step.op_type == "Transpose":
                (order,) = [list(attribute.ints) for attribute in step.attribute if attribute.name == "perm"]
                array = array.transpose(order)
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or transposed else 1
        numbers, scales = to_int8(array, axis)
        own = f"{node.name}/weight"
        tensors += [numpy_helper.from_array(numbers, f"{own}/int8"), numpy_helper.from_array(scales, f"{own}/scale")]
        heads[id(node)] = [
            onnx.helper.make_node(
                "DequantizeLinear", [f"{own}/int8", f"{own}/scale"], [own], f"{own}/dequantise", axis=axis
            )
        ]
        node.input[1] = own
    nodes = [after for node in model.graph.node for after in (*heads.get(id(node), []), node)]
    nodes = _used(nodes, {output.name for output in model.graph.output})
    used = {name for node in nodes for name in node.input}
    replace_contents(model, nodes, [tensor for tensor in (*model.graph.initializer, *tensors) if tensor.name in used])
    return model


def to_int8(
    array: npt.NDArray[Any], axis: int, least: npt.NDArray[np.float32] | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """`array` as int8 of its shape, and the scale of each index along `axis`, which is `least` or more."""
    others = tuple(index for index in range(array.ndim) if index != axis)
    scales = np.abs(array).max(axis=others) / 127
    if least is not None:
        scales = np.maximum(scales, least)
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    numbers = array / scales.reshape([-1 if index == axis else 1 for index in range(array.ndim)])
    np.clip(np.round(numbers, out=numbers), -127, 127, out=numbers)
    return np.ascontiguousarray(numbers, np.int8), scales


def _origin(name: str, makers: dict[str, Node]) -> tuple[list[Node], str]:
    """The casts and transposes that lead to `name`, last first, and what they begin with."""
    trail = []
    while (node := makers.get(name)) is not None and node.op_type in ("Cast", "Transpose"):
        trail.append(node)
        name = node.input[0]
    return trail, name


def _used(nodes: list[Node], wanted: set[str]) -> list[Node]:
    """Those of `nodes`, in topological order, that lead to `wanted`."""
    needed = set(wanted)
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]
