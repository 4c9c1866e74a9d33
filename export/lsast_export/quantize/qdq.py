"""int8 graphs: pairs of QuantizeLinear and DequantizeLinear (Q/DQ) where both CPU backends use them.

The places of the pairs decide whether a backend computes in int8 at all (found with the profilers of ONNX Runtime 1.32
and OpenVINO 2026.4 on mini's denoiser):

- convolutions: input in uint8 with a zero point, which suits the output of a SiLU, weights in int8 for each channel,
  bias in int32, and **output** quantized too: without it ONNX Runtime computes them in float32. OpenVINO does not need
  it and fuses it;
- linear layers: input in int8 **without** a zero point: with one OpenVINO subtracts it and multiplies in float32.
  Their output stays float: both backends multiply int8 into float32;
- a pair for each linear layer, even if several share an input. On x86 ONNX Runtime converts int8 to uint8 to multiply
  it, but only for a pair that one layer reads; a shared pair is computed in float32. It would merge equal pairs, so
  their scales differ in the last bit;
- products of two activations, softmax, norms and everything else stay float.

ONNX Runtime's own quantizer gives the same numbers (the tests compare), but holds all float32 weights of a graph in
memory twice; here one weight is in memory at a time.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from lsast_engines.errors import ExportError

from .weights import Model, Node, Weights, replace_contents

OPERATORS = ("Conv", "MatMul")
"""Operators to quantize; `Gemm` is the path of the timestep, a negligible part of the computation."""

_BIAS_ROOM = np.float32(2.0**30)
"""Largest magnitude of a bias in int32: half of what fits."""

Span = tuple[float, float]
"""Minimum and maximum."""

Ranges = Mapping[str, tuple[Span, Span]]
"""Ranges of a layer's input and output, by the name of its weight, which is the same in all graphs of a bundle."""


def layers_of(model: Model) -> list[Node]:
    """The nodes of a folded graph that can be quantized, in the order of the graph."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in OPERATORS and node.input[1] in constants]


def int8_graph(plain: Model, folder: Path, ranges: Ranges, layers: Collection[str]) -> Model:
    """A folded graph with `layers` in int8; references to the other weights stay.

    Args:
        plain: of `fold_weights`; it is not changed, and weights in a file are not copied.
        folder: of that file.
        ranges: of all `layers`.

    Raises:
        ExportError: a layer without a range.
    """
    model = onnx.ModelProto()
    model.CopyFrom(plain)
    inserted = _QdqInserter(Weights(plain, folder))
    nodes: list[Node] = []
    for node in model.graph.node:
        if node.name not in layers:
            nodes.append(node)
            continue
        if (spans := ranges.get(node.input[1])) is None:
            raise ExportError(
                f"found no range of layer {node.name} ({node.input[1]}); expected one recorded by the denoiser"
            )
        taken, given = spans
        nodes += inserted.conv(node, taken, given) if node.op_type == "Conv" else inserted.matmul(node, taken)
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    replace_contents(model, nodes, [*tensors, *inserted.tensors])
    del model.graph.value_info[:]
    return model


class _QdqInserter:
    """Makes the nodes and initializers of the pairs."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.tensors: list[Any] = []
        self._shared: dict[str, tuple[str, np.float32]] = {}
        self._readers: Counter[str] = Counter()

    def conv(self, node: Node, taken: Span, given: Span) -> Iterable[Node]:
        """A convolution between its pairs; its inputs and its output get new names."""
        source, weight, result = node.input[0], node.input[1], node.output[0]
        before: list[Node] = []
        if source not in self._shared:
            scale, zero = _unsigned(taken)
            self._shared[source] = (f"{source}/q", scale)
            before = self._pair(source, f"{source}/q", scale, zero)
        node.input[0], step = self._shared[source]
        bias = self._weights[node.input[2]] if len(node.input) > 2 else None
        # The bias has the scale of the product: beside tiny weights it could exceed 32 bits.
        least = np.abs(bias) / (step * _BIAS_ROOM) if bias is not None else None
        numbers, scales = to_int8(self._weights[weight], 0, least)
        before.append(self._constant(node, 1, numbers, scales, axis=0))
        if bias is not None:
            scales = scales * step
            before.append(self._constant(node, 2, np.round(bias / scales).astype(np.int32), scales, axis=0))
        scale, zero = _unsigned(given)
        node.output[0] = f"{result}/float"
        return [*before, node, *self._pair(f"{result}/float", result, scale, zero)]

    def matmul(self, node: Node, taken: Span) -> Iterable[Node]:
        """A matrix product behind a pair of its own."""
        source = node.input[0]
        scale = _signed(taken)
        for _ in range(self._readers[source]):
            scale = np.nextafter(scale, np.float32(np.inf), dtype=np.float32)
        own = f"{source}/q{self._readers[source]}"
        self._readers[source] += 1
        before = self._pair(source, own, scale, np.int8(0))
        numbers, scales = to_int8(self._weights[node.input[1]], 1)
        before.append(self._constant(node, 1, numbers, scales, axis=1))
        node.input[0] = own
        return [*before, node]

    def _pair(self, source: str, result: str, scale: np.float32, zero: np.generic) -> list[Node]:
        ends = [f"{result}/scale", f"{result}/zero"]
        self.tensors += [
            numpy_helper.from_array(np.asarray(value), name) for value, name in zip((scale, zero), ends, strict=True)
        ]
        make = onnx.helper.make_node
        return [
            make("QuantizeLinear", [source, *ends], [f"{result}/int8"], f"{result}/quantize"),
            make("DequantizeLinear", [f"{result}/int8", *ends], [result], f"{result}/dequantize"),
        ]

    def _constant(
        self, node: Node, place: int, numbers: npt.NDArray[Any], scales: npt.NDArray[np.float32], axis: int
    ) -> Node:
        """Make input `place` of `node` the constant `numbers` times `scales` along `axis`."""
        own = f"{node.name}/{'weight' if place == 1 else 'bias'}"
        for array, part in ((numbers, "int8"), (scales, "scale"), (np.zeros(len(scales), numbers.dtype), "zero")):
            self.tensors.append(numpy_helper.from_array(array, f"{own}/{part}"))
        node.input[place] = own
        ends = [f"{own}/{part}" for part in ("int8", "scale", "zero")]
        return onnx.helper.make_node("DequantizeLinear", ends, [own], f"{own}/dequantize", axis=axis)


def to_int8(
    array: npt.NDArray[Any], axis: int, least: npt.NDArray[np.float32] | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """`array` in int8, and the scale of each index along `axis`: max |array| / 127, at least `least`; no zero point."""
    others = tuple(index for index in range(array.ndim) if index != axis)
    scales = np.abs(array).max(axis=others) / 127
    if least is not None:
        scales = np.maximum(scales, least)
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    numbers = array / scales.reshape([-1 if index == axis else 1 for index in range(array.ndim)])
    np.clip(np.round(numbers, out=numbers), -127, 127, out=numbers)
    return np.ascontiguousarray(numbers, np.int8), scales


def _unsigned(span: Span) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 that cover `span` and zero."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    scale = (high - low) / 255
    if scale < np.finfo(np.float32).tiny:
        return np.float32(1), np.uint8(0)
    return np.float32(scale), np.uint8(round(-low / scale))


def _signed(span: Span) -> np.float32:
    """Scale of int8 without a zero point that covers `span`."""
    scale = max(-span[0], span[1], 0.0) / 127
    return np.float32(1 if scale < np.finfo(np.float32).tiny else scale)
