from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graph_runs import run_graph
from lsast_engines.bundle.graph_spec import GraphSpec, TensorSpec
from lsast_export.quantize.smoothquant import find_groups

from .test_quantize import calibrated, error, in_int8, save_graph

WIDTH = 16
SPEC = GraphSpec(
    "block", (TensorSpec("x", "float32", ("B", "n", WIDTH)),), (TensorSpec("y", "float32", ("B", "n", 4)),)
)


def block(folder: Path, zero: int | None = None) -> Path:
    """LayerNorm, two linear layers that share it; value * sigmoid(gate); a linear layer. Some channels are 60 times as
    large as the others; channel `zero` of the norm is 0."""
    text = """block (float[B, n, 16] x) => (float[B, n, 4] y) {
        normed = LayerNormalization <axis = -1> (x, gamma, beta)
        [to_value] value_product = MatMul (normed, value)
        values = Add (value_product, value_bias)
        [to_gate] gate_product = MatMul (normed, gate)
        open = Sigmoid (gate_product)
        gated = Mul (values, open)
        [last] y = MatMul (gated, last)
    }"""
    shapes = {"value": (WIDTH, WIDTH), "gate": (WIDTH, WIDTH), "last": (WIDTH, 4), "beta": (WIDTH,)}
    path = save_graph(folder / "block.onnx", text, **shapes)
    model = onnx.load(path)
    gamma, bias = np.ones(WIDTH, np.float32), np.full(WIDTH, 0.1, np.float32)
    gamma[[3, 11]], bias[5] = 60, 60
    beta = model.graph.initializer[-1]
    if zero is not None:
        gamma[zero] = 0
        beta.CopyFrom(numpy_helper.from_array(0 * gamma, "beta"))
    model.graph.initializer.extend(numpy_helper.from_array(*pair) for pair in ((gamma, "gamma"), (bias, "value_bias")))
    onnx.save(model, path)
    return path


def draw(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2, 9, WIDTH)).astype(np.float32)} for _ in range(count)]


def test_find_groups_finds_norms_and_gated_products_that_nothing_else_reads(tmp_path):
    model = onnx.load(block(tmp_path))
    norm, gate = find_groups(model)
    assert (norm.activation, norm.weights, norm.producers) == ("normed", ("value", "gate"), ("gamma", "beta"))
    assert (gate.activation, gate.weights, gate.producers) == ("gated", ("last",), ("value", "value_bias"))
    model.graph.output.append(helper.make_tensor_value_info("normed", TensorProto.FLOAT, ["B", "n", WIDTH]))
    model.graph.node.append(helper.make_node("Neg", ["value_bias"], ["other"], "other"))
    assert not find_groups(model)


def test_smoothing_factors_match_the_papers_formula(tmp_path):
    path = block(tmp_path)
    factors = calibrated(path, draw(4), SPEC).smoothing_factors(0.25)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    x = np.concatenate([feeds["x"] for feeds in draw(4)]).astype(np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = normed * tensors["gamma"] + tensors["beta"]
    largest = np.maximum(*(np.abs(tensors[name]).max(axis=1) for name in ("value", "gate")))
    expected = np.abs(normed).reshape(-1, WIDTH).max(axis=0) ** 0.25 / largest**0.75
    np.testing.assert_allclose(factors["value"], expected, rtol=1e-4)
    np.testing.assert_array_equal(factors["gate"], factors["value"])


def test_smoothing_factors_of_a_zero_channel_are_one(tmp_path):
    factors = calibrated(block(tmp_path, zero=2), draw(4), SPEC).smoothing_factors(0.7)
    assert factors["value"][2] == 1
    assert np.isfinite(factors["value"]).all()


def test_smooth_halves_the_error_of_int8_with_outliers(tmp_path):
    path = block(tmp_path)
    (feeds,) = draw(1, seed=2)
    expected = run_graph(path, feeds)["y"]
    calibration = calibrated(path, draw(8), SPEC)
    plain = error(run_graph(in_int8(calibration), feeds)["y"], expected)
    calibration.smooth(calibration.smoothing_factors(0.5))
    assert error(run_graph(in_int8(calibration), feeds)["y"], expected) < plain / 2


def test_folded_and_smoothed_denoiser_computes_the_same_in_the_predicted_ranges(bundles, feeds, run, tmp_path):
    bundle = bundles["bf16"]
    given = feeds(bundle, 1, 2, 8, 8)
    spec = bundle.manifest.graphs["denoiser"]
    calibration = calibrated(bundle.graph_path("denoiser"), [given], spec, tmp_path / "calibration")
    factors = calibration.smoothing_factors(0.7)
    assert len(factors) >= 4
    calibration.smooth(factors)
    predicted = dict(calibration.ranges)
    expected = run(bundle, "denoiser", **given)["eps"]
    np.testing.assert_allclose(calibration(given)["eps"], expected, atol=1e-4 * np.abs(expected).max())
    for name, (taken, _) in calibration.ranges.items():
        np.testing.assert_allclose(predicted[name][0], taken, rtol=1e-3, atol=1e-3)
