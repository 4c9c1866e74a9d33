"""Weights and activations in 8 bits: ONNX Runtime's static quantiser, told what both backends turn into int8 code.

Where the pairs of QuantizeLinear and DequantizeLinear stand decides whether a backend computes in int8 at all (found
with the profilers of ONNX Runtime 1.32 and OpenVINO 2026.4 on mini's denoiser):

- convolutions: input in uint8 with a zero point, which suits what a SiLU gives, weights in int8 for each channel, bias
  in int32, and **output** quantised too: without it ONNX Runtime computes them in float32. OpenVINO does not need it
  and fuses it;
- linear layers: input in int8 **without** a zero point: with one OpenVINO subtracts it and multiplies in float32.
  Their output stays float: both backends multiply int8 into float32;
- products of two activations, softmax, norms and everything else stay float.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from .plain_graph import Model, Weights, plain_graph, replace_contents
from .trial import Feeds

OPERATORS = ("Conv", "MatMul")
"""What is quantised; `Gemm` is the path of the timestep, whose 10^-3 of the arithmetic gains nothing."""

_ENDS = ("conv_in.", "conv_out.")
"""Weights of a network's first and last convolution, which stay float: all that it sees and says goes through them."""


def ends(path: Path) -> frozenset[str]:
    """Names of the nodes in the graph of `path` that are a network's first or last convolution, or of its time path."""
    model = onnx.load(str(path), load_external_data=False)
    makers = {output: node for node in model.graph.node for output in node.output}

    def weight(node: Any) -> str:
        name = node.input[1]
        while name in makers and makers[name].op_type in ("Cast", "Transpose"):
            name = makers[name].input[0]
        return str(name)

    return frozenset(
        node.name
        for node in model.graph.node
        if node.op_type == "Gemm" or (node.op_type == "Conv" and any(end in weight(node) for end in _ENDS))
    )


class Calibration:
    """A graph with the ranges that its activations take: calibrated once, quantised in as many ways as are tried."""

    def __init__(self, path: Path, feeds: Sequence[Feeds]) -> None:
        """Run the graph of `path` in float32 on all `feeds` and note the least and greatest value of activations."""
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        self._model = _prepared(plain_graph(path))
        with tempfile.TemporaryDirectory(prefix="lsast-calibration.") as scratch:
            plain = Path(scratch) / "plain.onnx"
            onnx.save_model(self._model, str(plain), save_as_external_data=True, location="plain.data")
            calibrator = create_calibrator(
                plain,
                list(OPERATORS),
                augmented_model_path=str(Path(scratch) / "augmented.onnx"),
                calibrate_method=CalibrationMethod.MinMax,
                use_external_data_format=True,
                providers=["CPUExecutionProvider"],
            )
            calibrator.collect_data(_Reader(feeds))
            self._ranges = calibrator.compute_data()
        # Saving moved the weights out of the model.
        self._model = _prepared(plain_graph(path))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the nodes that can be quantised, in the order of the graph."""
        constants = {tensor.name for tensor in self._model.graph.initializer}
        return tuple(
            node.name for node in self._model.graph.node if node.op_type in OPERATORS and node.input[1] in constants
        )

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 (hex) of each layer's weights: the same layer has other names in other graphs."""
        arrays = Weights(self._model, Path())
        inputs = {node.name: node.input[1] for node in self._model.graph.node if len(node.input) > 1}
        return {layer: hashlib.sha256(arrays[inputs[layer]].tobytes()).hexdigest() for layer in self.layers}

    def quantised(self, kept: Iterable[str]) -> Model:
        """The graph with every layer in int8 but those that are `kept`."""
        from onnxruntime.quantization import QDQQuantizer, QuantType

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        layers = set(self.layers) - set(kept)
        linear = {node.input[0] for node in model.graph.node if node.op_type == "MatMul" and node.name in layers}
        convolved = {node.input[0] for node in model.graph.node if node.op_type == "Conv" and node.name in layers}
        symmetric = [{"quant_type": QuantType.QInt8, "symmetric": True}]
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=[],  # which is all
            nodes_to_exclude=[node.name for node in model.graph.node if node.name not in layers],
            op_types_to_quantize=list(OPERATORS),
            extra_options={
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
                "QDQOpTypePerChannelSupportToAxis": {"Conv": 0, "MatMul": 1},
                "TensorQuantOverrides": dict.fromkeys(linear - convolved, symmetric),
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        quantised = quantizer.model.model
        _pairs_apart(quantised)
        # Shapes that were inferred before have gone stale, and name scratch values.
        del quantised.graph.value_info[:]
        return quantised


def _pairs_apart(model: Model) -> None:
    """Give every linear layer a pair of its own where several share one.

    On x86 ONNX Runtime multiplies int8 by turning it into uint8, which it does for a pair that one layer reads; what
    several read it computes in float32. Equal pairs it would make one again, so that their scales differ in the last
    bit.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, int] = {}
    nodes = []
    for node in model.graph.node:
        shared = node.input[0] if node.op_type == "MatMul" else ""
        if (end := makers.get(shared)) is not None and end.op_type == "DequantizeLinear" and end.input[0] in makers:
            count = readers.get(shared, 0)
            readers[shared] = count + 1
            if count:
                begin, own = makers[end.input[0]], f"{shared}/{count}"
                scale = numpy_helper.to_array(tensors[end.input[1]])
                for _ in range(count):
                    scale = np.nextafter(scale, np.float32(np.inf), dtype=np.float32)
                model.graph.initializer.append(numpy_helper.from_array(np.asarray(scale), f"{own}/scale"))
                nodes += [
                    onnx.helper.make_node(
                        "QuantizeLinear", [begin.input[0], f"{own}/scale", begin.input[2]], [f"{own}/int8"], f"{own}/q"
                    ),
                    onnx.helper.make_node(
                        "DequantizeLinear", [f"{own}/int8", f"{own}/scale", end.input[2]], [own], f"{own}/dq"
                    ),
                ]
                node.input[0] = own
        nodes.append(node)
    replace_contents(model, nodes, model.graph.initializer)


class _Reader:
    """Hands feeds to a calibrator (onnxruntime.quantization.CalibrationDataReader)."""

    def __init__(self, feeds: Iterable[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next feeds, None at the end."""
        return next(self._feeds, None)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> Feeds:
        return next(self._feeds)


def _prepared(model: Model) -> Model:
    """`model` with the types of its values, which the quantiser asks for."""
    return onnx.shape_inference.infer_shapes(model)
