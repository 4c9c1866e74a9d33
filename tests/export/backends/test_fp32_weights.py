"""Weights of 16 bits unpacked for the backends, as onnx and safetensors read the result."""

import os
import shutil
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from lsast_engines.backends import fp32_weights
from lsast_engines.backends.fp32_weights import is_current, with_fp32_weights
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS
from lsast_engines.files import file_sha256

MIN_BYTES = fp32_weights.MIN_BYTES


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp32_weights, "MIN_BYTES", 0)


@pytest.mark.parametrize("storage_dtype", ["fp16", "bf16"])
def test_with_fp32_weights_matches_a_float32_bundle(bundles, tmp_path, storage_dtype):
    bundle = bundles[storage_dtype]
    stored = load_file(bundle.path / "base.safetensors")
    for name in REQUIRED_GRAPHS:
        path = with_fp32_weights(bundle.graph_path(name), tmp_path)
        assert path.is_relative_to(tmp_path)
        onnx.checker.check_model(str(path), full_check=True)
        model, fp32 = onnx.load(path), onnx.load(bundles["fp32"].graph_path(name), load_external_data=False)
        # The casts are gone: the very nodes of the float32 bundle's graph, up to the names of weights.
        plain = [(node.op_type, len(node.input), list(node.output)) for node in fp32.graph.node]
        assert [(node.op_type, len(node.input), list(node.output)) for node in model.graph.node] == plain
        values = {tensor.name: tensor for tensor in model.graph.initializer}
        external = [t.name for t in fp32.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert external
        for key in external:
            tensor = values[f"{key}/float32"]
            assert tensor.data_type == onnx.TensorProto.FLOAT
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), stored[key].float().numpy())
    wide = load_file(path.parent / "base.safetensors")
    assert wide.keys() == stored.keys()
    assert all(torch.equal(wide[key], stored[key].float()) for key in stored)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_with_fp32_weights_computes_the_same(bundles, run, feeds, monkeypatch, tmp_path, backend):
    bundle = bundles["bf16"]
    inputs = feeds(bundle, 1, 2, 8, 8)
    spec = bundle.manifest.graphs["denoiser"]
    with closing(open_engine(bundle.graph_path("denoiser"), spec, backend, threads=1, cache=tmp_path)) as engine:
        found = engine(inputs)["eps"].copy()
    monkeypatch.setattr(fp32_weights, "MIN_BYTES", 1 << 40)
    expected = run(bundle, "denoiser", backend, **inputs)["eps"]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("storage_dtype", "least"), [("fp16", MIN_BYTES), ("fp32", 0)])
def test_with_fp32_weights_leaves_small_and_float32_weights_alone(bundles, monkeypatch, tmp_path, storage_dtype, least):
    monkeypatch.setattr(fp32_weights, "MIN_BYTES", least)
    path = bundles[storage_dtype].graph_path("controlnet_cond")
    assert with_fp32_weights(path, tmp_path) == path
    assert not list(tmp_path.iterdir())


def test_with_fp32_weights_converts_once_for_all_graphs(bundles, tmp_path):
    first = with_fp32_weights(bundles["bf16"].graph_path("controlnet_cond"))
    assert first.is_relative_to(tmp_path / "home" / "fp32")
    inode = (first.parent / "base.safetensors").stat().st_ino
    second = with_fp32_weights(bundles["bf16"].graph_path("vae_encoder"))
    assert (second.parent, (second.parent / "base.safetensors").stat().st_ino) == (first.parent, inode)


def test_with_fp32_weights_that_were_damaged_converts_again(bundles, tmp_path):
    path = bundles["bf16"].graph_path("controlnet_cond")
    weights = with_fp32_weights(path, tmp_path).parent / "base.safetensors"
    whole = weights.read_bytes()
    digest = weights.with_suffix(".sha256")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for written in (digest.read_bytes(), b"\xff"):
        digest.write_bytes(written)
        with_fp32_weights(path, tmp_path)
        assert weights.read_bytes() == whole
        assert digest.read_text() == file_sha256(weights)


def test_with_fp32_weights_of_other_weights_of_the_same_size_and_time_are_not_used(bundles, tmp_path):
    copy = Path(shutil.copytree(bundles["bf16"].path, tmp_path / "copy"))
    weights, manifest = copy / "base.safetensors", copy / "manifest.json"
    stat = weights.stat()
    first = with_fp32_weights(copy / "controlnet_cond.onnx", tmp_path)
    old = file_sha256(weights)
    weights.write_bytes(weights.read_bytes()[:-2] + bytes(2))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    manifest.write_text(manifest.read_text().replace(old, file_sha256(weights)))
    assert with_fp32_weights(copy / "controlnet_cond.onnx", tmp_path).parent != first.parent


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_with_fp32_weights_without_a_cache_of_its_own_leaves_them_to_the_backend(
    bundles, tmp_path, monkeypatch, caplog
):
    path = bundles["fp16"].graph_path("controlnet_cond")
    cache = tmp_path / "cache"
    before = os.umask(0)
    try:
        for _ in range(2):
            assert with_fp32_weights(path, cache).parent.parent == cache
    finally:
        os.umask(before)
    cache.chmod(0o777)
    assert with_fp32_weights(path, cache) == path
    assert f"painting needs more memory: {cache} may be written by others" in caplog.text
    (tmp_path / "file").touch()
    assert with_fp32_weights(path, tmp_path / "file") == path
    assert "cannot be made (" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert with_fp32_weights(path, tmp_path / "full") == path
    assert "found 0.0 GB free at" in caplog.text
    assert not list(tmp_path.glob("full/**/*.safetensors"))


def test_with_fp32_weights_replaces_what_the_same_file_held_before(bundles, tmp_path):
    bundle, cache = shutil.copytree(bundles["fp16"].path, tmp_path / "bundle"), tmp_path / "cache"
    old = with_fp32_weights(bundle / "denoiser.onnx", cache).parent
    other = with_fp32_weights(bundles["bf16"].graph_path("denoiser"), cache).parent
    assert is_current(old)
    os.utime(bundle / "base.safetensors", (1, 1))
    assert not is_current(old)
    new = with_fp32_weights(bundle / "denoiser.onnx", cache).parent
    assert {new, other} == set(cache.iterdir())
    assert is_current(new)
