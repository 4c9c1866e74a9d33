"""Attention rewritten for GPUs computes what the exported graph computes: to the last bit, in float32."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from fp16_rounding import round_every_result
from graph_runs import random_feeds, run_graph
from lsast_engines.backends.onnxruntime import GPU_SUFFIX, OnnxRuntimeEngine
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.bundle.graph_spec import GraphSpec, TensorSpec
from lsast_export.graphs.external_weights import save_graph
from lsast_export.graphs.gpu_graph import write_gpu_graph
from lsast_export.graphs.modules import SplitProcessor
from lsast_export.graphs.trace import trace


@pytest.fixture
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, MultiHeadAttention adds up in another order unless this is set."""
    monkeypatch.setenv("ORT_DISABLE_FLASH_ATTENTION", "1")


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize(("graph", "attentions"), [("denoiser", 28), ("unet_outer", 6), ("vae_decoder", 0)])
@pytest.mark.parametrize("fused", [True, False])
def test_rewritten_graphs_of_mini_give_the_same_bits(graph, attentions, fused):
    spec = Bundle.open(EMBEDDED, verify_hashes=False).manifest.graphs[graph]
    path, rewritten = EMBEDDED / f"{graph}.onnx", EMBEDDED / f".test-{graph}-{fused}.onnx"
    try:
        write_gpu_graph(path, rewritten, graph, half=False, fused=fused)
        feeds = random_feeds(spec)
        for name, expected in run_graph(path, feeds).items():
            np.testing.assert_array_equal(run_graph(rewritten, feeds)[name], expected)
        onnx.checker.check_model(str(rewritten), full_check=True)
        assert operators(rewritten).count("MultiHeadAttention" if fused else "Softmax") == attentions
    finally:
        rewritten.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("graph", "bound"), [("vae_encoder", 1e-3), ("controlnet_cond", 1e-3), ("denoiser", 1e-3), ("vae_decoder", 2e-3)]
)
def test_gpu_graphs_of_mini_are_near_the_exported_ones(graph, bound):
    """The files of the bundle: by the engine as far as a CPU has it, and with the rounding of a GPU."""
    bundle = Bundle.open(EMBEDDED, verify_hashes=False)
    spec, path = bundle.manifest.graphs[graph], bundle.graph_path(graph)
    assert f"{graph}{GPU_SUFFIX}" in bundle.manifest.files
    feeds = random_feeds(spec)
    expected = OnnxRuntimeEngine(path, spec, "cpu", 1)(feeds)
    found = OnnxRuntimeEngine(path, spec, "cpu", 1, "fp16")(feeds)
    rounded = EMBEDDED / f".test-{graph}-rounded.onnx"
    try:
        halves = round_every_result(EMBEDDED / f"{graph}{GPU_SUFFIX}", rounded)
        assert halves == 0 if graph == "vae_encoder" else halves > 10  # the encoder is float32 throughout
        as_on_gpu = run_graph(rounded, feeds, optimize=False)
    finally:
        rounded.unlink(missing_ok=True)
    for name, values in expected.items():
        largest = max(1e-6, np.abs(values).max())
        assert np.abs(found[name] - values).max() <= 1e-3 * largest
        assert np.abs(as_on_gpu[name] - values).max() <= bound * largest


class Split(nn.Module):
    """diffusers' attention with its heads split, as in a large base."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.attention = Attention(query_dim=24, heads=heads, dim_head=24 // heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attention(x)
        return out


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3)])
def test_split_heads_are_merged(tmp_path, heads, groups):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    module = Split(heads).eval()
    module.attention.set_processor(SplitProcessor(groups))
    shape = ("B", "N", 24)
    spec = GraphSpec("toy", (TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", shape),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lsast_export.graphs.trace._examples", lambda *_: (torch.rand(2, 7, 24),))
        traced = trace(module, spec, 8, 8)
    weights, path = tmp_path / "base.safetensors", tmp_path / "toy.onnx"
    save_file(module.state_dict(), weights)
    save_graph(traced, weights, path)
    x = torch.randn(3, 35, 24, generator=torch.Generator().manual_seed(1))
    assert operators(path).count("Softmax") == groups
    for fused, operator in ((True, "MultiHeadAttention"), (False, "Softmax")):
        rewritten = tmp_path / f"{fused}.onnx"
        write_gpu_graph(path, rewritten, "attention", half=False, fused=fused)
        assert operators(rewritten).count(operator) == 1
        assert "Split" not in operators(rewritten)
        found = run_graph(rewritten, {"x": x.numpy()})["y"]
        np.testing.assert_allclose(found, run_graph(path, {"x": x.numpy()})["y"], rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-4, atol=1e-5)
