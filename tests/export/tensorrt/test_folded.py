"""Folding constants, which every compiler does first, changes nothing that a graph computes (polygraphy folds)."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from graph_runs import random_feeds, run_graph
from lsast_engines.bundle.bundle import EMBEDDED, Bundle


@pytest.mark.needs("polygraphy", "onnx_graphsurgeon")
@pytest.mark.parametrize("graph", ["vae_encoder", "controlnet_cond", "denoiser", "vae_decoder"])
@pytest.mark.filterwarnings("ignore")
def test_folded_graphs_compute_the_same(graph: str) -> None:
    from polygraphy.backend.onnx import fold_constants

    spec = Bundle.open(EMBEDDED, verify_hashes=False).manifest.graphs[graph]
    model = onnx.load(EMBEDDED / f"{graph}.onnx")
    # Another pass finds nothing more and takes as long.
    folded = fold_constants(onnx.load(EMBEDDED / f"{graph}.onnx"), num_passes=1)
    assert len(folded.graph.node) < len(model.graph.node)
    feeds = random_feeds(spec, {"B": 1, "G": 2, "H": 64, "W": 128, "h": 8, "w": 16})
    # ONNX Runtime's own folding would make the two alike before they are compared.
    found = run_graph(folded.SerializeToString(), feeds, optimize=False)
    for name, expected in run_graph(model.SerializeToString(), feeds, optimize=False).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        assert expected.std() > 0 or graph == "vae_encoder"  # mini's encoder has no spread
