from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lsast_engines.bundle.bundle import Bundle
from lsast_export.quantize.calibration import MinMaxObserver
from lsast_export.quantize.smoothquant import MinMax, find_groups, smooth, smoothing_factors
from lsast_export.quantize.weights import Weights, fold_weights

from .test_quantize import calibrated, error, run_model

WIDTH = 16


def block(folder: Path, loud: float = 60.0) -> Path:
    """LayerNorm, two linear layers that share it; value * sigmoid(gate); a linear layer. Few channels are `loud`."""
    rng = np.random.default_rng(7)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(WIDTH)).astype(np.float32), name)

    gamma = np.ones(WIDTH, np.float32)
    gamma[[3, 11]] = loud
    bias = 0.1 * rng.standard_normal(WIDTH).astype(np.float32)
    bias[5] = loud
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["normed"], "norm", axis=-1),
        helper.make_node("MatMul", ["normed", "value"], ["value_product"], "to_value"),
        helper.make_node("Add", ["value_product", "value_bias"], ["values"], "value_add"),
        helper.make_node("MatMul", ["normed", "gate"], ["gate_product"], "to_gate"),
        helper.make_node("Sigmoid", ["gate_product"], ["open"], "open"),
        helper.make_node("Mul", ["values", "open"], ["gated"], "gated"),
        helper.make_node("MatMul", ["gated", "last"], ["y"], "last_product"),
    ]
    tensors = [
        numpy_helper.from_array(gamma, "gamma"), weight("beta", WIDTH), weight("value", WIDTH, WIDTH),
        numpy_helper.from_array(bias, "value_bias"), weight("gate", WIDTH, WIDTH), weight("last", WIDTH, 4),
    ]  # fmt: skip
    ends = [("x", ["B", "n", WIDTH]), ("y", ["B", "n", 4])]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in ends)
    graph = helper.make_graph(nodes, "block", inputs, outputs, tensors)
    path = folder / "block.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def draw(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2, 9, WIDTH)).astype(np.float32)} for _ in range(count)]


def channel_minmax(path: Path, feeds: Iterable[dict[str, np.ndarray]]) -> dict[str, MinMax]:
    """Run the plain graph of the file `path` on `feeds`: least and greatest value by channel of what groups share."""
    model = onnx.load(str(path), load_external_data=False)
    weights = Weights(model, path.parent)
    groups = find_groups(model)
    observer = MinMaxObserver(
        model, path.parent, {group.activation: weights.shape(group.weights[0])[0] for group in groups}
    )
    for given in feeds:
        observer(given)
    return observer.min_max


def test_find_groups_finds_norms_and_gated_products(tmp_path: Path) -> None:
    norm, gate = find_groups(onnx.load(block(tmp_path)))
    assert (norm.activation, norm.weights, norm.producers) == ("normed", ("value", "gate"), ("gamma", "beta"))
    assert (gate.activation, gate.weights, gate.producers) == ("gated", ("last",), ("value", "value_bias"))


def test_find_groups_skips_weights_with_another_reader(tmp_path: Path) -> None:
    model = onnx.load(block(tmp_path))
    model.graph.output.append(helper.make_tensor_value_info("normed", TensorProto.FLOAT, ["B", "n", WIDTH]))
    model.graph.node.append(helper.make_node("Neg", ["value_bias"], ["other"], "other"))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [WIDTH]))
    assert not find_groups(model)


def test_smoothing_factors_match_the_papers_formula(tmp_path: Path) -> None:
    model = onnx.load(path := block(tmp_path))
    factors = smoothing_factors(model, channel_minmax(path, draw(4)), alpha=0.25)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    gamma, beta = tensors["gamma"], tensors["beta"]
    x = np.concatenate([feeds["x"] for feeds in draw(4)]).astype(np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gamma + beta
    largest = np.maximum(*(np.abs(tensors[name]).max(axis=1) for name in ("value", "gate")))
    expected = np.abs(normed).reshape(-1, WIDTH).max(axis=0) ** 0.25 / largest**0.75
    np.testing.assert_allclose(factors["value"], expected, rtol=1e-4)
    np.testing.assert_array_equal(factors["gate"], factors["value"])


def test_smooth_halves_the_error_of_int8_with_outliers(tmp_path: Path) -> None:
    path = block(tmp_path)
    (feeds,) = draw(1, seed=2)
    (expected,) = run_model(onnx.load(path), feeds)
    calibration = calibrated(path, draw(8))
    plain = error(run_model(calibration.quantized([]), feeds)[0], expected)
    calibration.smooth(0.5)
    assert error(run_model(calibration.quantized([]), feeds)[0], expected) < plain / 2


def test_calibration_smooth_predicts_the_new_ranges(tmp_path: Path) -> None:
    calibration = calibrated(block(tmp_path), draw(4))
    calibration.smooth(0.5)
    predicted = dict(calibration.ranges)
    for given in draw(4):
        calibration(given)
    calibration.close()
    for name, found in calibration.ranges.items():
        np.testing.assert_allclose(predicted[name].input, found.input, rtol=1e-4)


def test_smoothing_factors_of_a_zero_channel_are_one(tmp_path: Path) -> None:
    model = onnx.load(path := block(tmp_path))
    weights = Weights(model, tmp_path)
    for tensor in model.graph.initializer:
        if tensor.name in ("gamma", "beta"):
            array = weights[tensor.name].copy()
            array[2] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    factors = smoothing_factors(model, channel_minmax(path, draw(4)))
    assert factors["value"][2] == 1
    assert np.isfinite(factors["value"]).all()


def test_smooth_of_the_denoiser_computes_the_same(
    bundles: dict[str, Bundle], feeds: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = bundles["fp32"]
    given = feeds(bundle, 1, 2, 8, 8)
    onnx.save(fold_weights(bundle.graph_path("denoiser")), path := tmp_path / "plain.onnx")
    model = onnx.load(path)
    (expected,) = run_model(model, given)
    assert smooth(model, smoothing_factors(model, channel_minmax(path, [given]))) >= 4
    np.testing.assert_allclose(run_model(model, given)[0], expected, atol=1e-4 * np.abs(expected).max())
