"""Folding constants, which every compiler does first, changes nothing that a graph computes (polygraphy folds)."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from lsast_engines.bundle.bundle import EMBEDDED, Bundle


def session(model: onnx.ModelProto) -> object:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Its own folding would make the two alike before they are compared.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.needs("polygraphy", "onnx_graphsurgeon")
@pytest.mark.parametrize("graph", ["vae_encoder", "controlnet_cond", "denoiser", "vae_decoder"])
@pytest.mark.filterwarnings("ignore")
def test_folded_graphs_compute_the_same(graph: str) -> None:
    from polygraphy.backend.onnx import fold_constants

    spec = Bundle.open(EMBEDDED, verify_hashes=False).manifest.graphs[graph]
    model = onnx.load(EMBEDDED / f"{graph}.onnx")
    plain = session(model)
    # Another pass finds nothing more and takes as long.
    folded = fold_constants(onnx.load(EMBEDDED / f"{graph}.onnx"), num_passes=1)
    assert len(folded.graph.node) < len(model.graph.node)
    lengths = {"B": 1, "G": 2, "H": 64, "W": 128, "h": 8, "w": 16}
    rng = np.random.default_rng(0)
    feeds = {}
    for tensor in spec.inputs:
        shape = [lengths[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
        values = rng.integers(0, 1000, shape) if tensor.dtype == "int64" else rng.uniform(-1, 1, shape)
        feeds[tensor.name] = np.asarray(values, tensor.dtype)
    names = [tensor.name for tensor in spec.outputs]
    for expected, found in zip(plain.run(names, feeds), session(folded).run(names, feeds), strict=True):  # type: ignore[attr-defined]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        assert expected.std() > 0 or graph == "vae_encoder"  # mini's encoder has no spread
