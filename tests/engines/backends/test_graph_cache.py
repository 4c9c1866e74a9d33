"""The graph cache on both backends: the same numbers without the work, and never those of another graph."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lsast_engines.backends import graph_cache, onnxruntime, openvino
from lsast_engines.backends.graph_cache import DIGESTS, SOURCE
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.graph_spec import GraphSpec, TensorSpec

SPEC = GraphSpec("product", (TensorSpec("x", "float32", ("N", 64)),), (TensorSpec("y", "float32", ("N", 64)),))
X = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)


@pytest.fixture(params=["fp32", "fp16"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A bundle as far as the cache looks at it: a manifest, the graph y = x W, and W in a file of its own."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    write_graph(folder, 1.0, np.dtype(np.float32 if request.param == "fp32" else np.float16))
    return folder


def write_graph(folder: Path, factor: float, dtype: np.dtype[Any]) -> None:
    make = onnx.helper
    weight = np.random.default_rng(1).standard_normal((64, 64)) * factor
    nodes = [
        make.make_node("Cast", ["W"], ["W32"], to=onnx.TensorProto.FLOAT),
        make.make_node("MatMul", ["x", "W32"], ["y"]),
    ]
    x, y = (make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 64]) for name in "xy")
    graph = make.make_graph(nodes, "product", [x], [y], [onnx.numpy_helper.from_array(weight.astype(dtype), "W")])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10)
    (folder / "product.data").unlink(missing_ok=True)
    onnx.save(model, folder / "product.onnx", save_as_external_data=True, location="product.data", size_threshold=0)


class Case:
    """A backend: runs the graph, and counts how often it was built from the graph file."""

    def __init__(self, backend: str, folder: Path) -> None:
        self.backend, self.folder = backend, folder
        self.builds = 0

    def run(self) -> np.ndarray:
        with closing(open_engine(self.folder / "product.onnx", SPEC, self.backend, threads=1)) as engine:
            return engine({"x": X})["y"].copy()

    def entries(self) -> list[Path]:
        return sorted((self.folder.parent / "home" / "compiled" / self.backend).glob("*/*-*"))


@pytest.fixture(params=["onnxruntime", "openvino"])
def case(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    case = Case(request.param, folder)
    module: Any = {"onnxruntime": onnxruntime, "openvino": openvino}[request.param]

    def counted(*arguments: Any) -> Any:
        *rest, build = arguments

        def count(entry: Path | None) -> Any:
            case.builds += 1
            return build(entry)

        return graph_cache.open_cached(*rest, count)

    monkeypatch.setattr(module, "open_cached", counted)
    return case


def test_cache_builds_once_and_gives_the_same_values(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(graph_cache, "MAX_WEIGHT_BYTES", 0)
        plain = case.run()
    assert case.entries() == []
    for _ in range(3):
        np.testing.assert_array_equal(case.run(), plain)
    assert (case.builds, len(case.entries())) == (2, 1)


def test_cache_replaces_the_entry_of_other_weights(case: Case) -> None:
    before = case.run()
    (old,) = case.entries()
    dtype = np.dtype(np.float32 if (case.folder / "product.data").stat().st_size > 64 * 64 * 3 else np.float16)
    write_graph(case.folder, 0.5, dtype)
    np.testing.assert_allclose(case.run(), before / 2, rtol=1e-3, atol=1e-3)
    (new,) = case.entries()
    assert new != old


def test_cache_of_other_weights_of_the_same_size_and_time_is_not_used(case: Case) -> None:
    weights = case.folder / "product.data"
    declare(case.folder)
    os.utime(weights, (10**9, 10**9))
    before = case.run()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 128  # the sign of a weight
    weights.write_bytes(content)
    os.utime(weights, (10**9, 10**9))
    declare(case.folder)
    assert (case.run() != before).any()


def declare(folder: Path) -> None:
    names = ("product.onnx", "product.data")
    files = {name: {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()} for name in names}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def test_cache_entry_that_a_backend_does_not_open_is_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = case.run()
    entries = case.entries()

    def fail(entry: Path) -> Any:
        raise RuntimeError("no threads left")

    module: Any = {"onnxruntime": onnxruntime, "openvino": openvino}[case.backend]
    open_cached = module.open_cached
    with monkeypatch.context() as patch:
        patch.setattr(module, "open_cached", lambda *arguments: open_cached(*arguments[:4], fail, arguments[5]))
        np.testing.assert_array_equal(case.run(), expected)
    assert case.entries() == entries
    assert case.builds == 2
    case.run()
    assert case.builds == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_cache_that_others_may_write_is_neither_read_nor_written(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    expected = case.run()
    (entry,) = case.entries()
    for path in (next(entry.iterdir()), entry, entry.parents[2]):
        path.chmod(path.stat().st_mode | 0o002)
        before = sorted(entry.parents[2].rglob("*"))
        case.builds = 0
        np.testing.assert_array_equal(case.run(), expected)
        assert case.builds == 1
        assert f"{path} may be written by others" in caplog.text
        assert sorted(entry.parents[2].rglob("*")) == before
        path.chmod(path.stat().st_mode & 0o755)


def test_cache_keeps_an_entry_for_each_compute_dtype(case: Case) -> None:
    case.run()
    (entry,) = case.entries()
    other = entry.with_name(entry.name.replace("-fp32-", "-bf16-"))
    other.mkdir()
    graph_cache.evict_stale(entry)
    assert case.entries() == sorted([entry, other])
    entry.with_name("product-fp32-older").mkdir()
    graph_cache.evict_stale(entry)
    assert case.entries() == sorted([entry, other])


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "pipe", "another's"])
def test_cache_reports_and_rebuilds_damaged_files(case: Case, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    expected = case.run()
    (entry,) = case.entries()
    names = [file.name for file in entry.iterdir()]
    assert len(names) > 1
    assert DIGESTS in names
    for count, name in enumerate(names, start=2):
        written = (entry / name).read_bytes()
        content = bytearray(written)
        content[len(content) // 2] ^= 1
        (entry / name).unlink()
        if damage == "pipe":
            os.mkfifo(entry / name)
        elif damage == "another's" and name == DIGESTS:  # whole, but of another graph
            (entry / name).write_bytes(written.replace(b"-fp32-", b"-bf16-"))
        elif damage == "another's":
            (entry / name).write_bytes(b"")
        elif damage != "gone":
            (entry / name).write_bytes(content[: len(content) // 2] if damage == "cut" else content)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lsast.graph_cache"):
            np.testing.assert_array_equal(case.run(), expected)
        assert "the graph is built again" in caplog.text
        assert (case.builds, case.entries()) == (count, [entry])
        np.testing.assert_array_equal(case.run(), expected)
        assert case.builds == count


def test_cache_that_cannot_be_written_does_not_stop_a_run(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = case.run()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "file"))
    np.testing.assert_array_equal(case.run(), expected)
    assert case.builds == 2


def test_cache_leaves_out_large_weights_and_graphs_of_no_bundle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(graph_cache, "MAX_WEIGHT_BYTES", (case.folder / "product.data").stat().st_size)
        case.run()
    (case.folder / "manifest.json").unlink()
    case.run()
    assert (case.builds, case.entries()) == (2, [])


def test_onnxruntime_cache_depends_on_the_processor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("onnxruntime", folder)
    case.run()
    (old,) = case.entries()
    monkeypatch.setattr(onnxruntime, "processor", lambda: "another")
    case.run()
    (new,) = case.entries()
    assert new != old


def test_open_cached_keeps_the_entry_of_a_quicker_process(folder: Path) -> None:
    arguments: tuple[Any, ...] = ("onnxruntime", folder / "product.onnx", "fp32", "any")
    entry = graph_cache.cache_path(*arguments)
    assert entry is not None

    def build(fresh: Path | None) -> str:
        assert fresh is not None
        (fresh / "second").touch()
        entry.mkdir()
        (entry / "first").touch()
        return "session"

    load: Callable[[Path], str] = lambda entry: "loaded"  # noqa: E731
    assert graph_cache.open_cached(*arguments, load, build) == "session"
    assert [file.name for file in entry.iterdir()] == ["first"]
    assert {file.name for file in entry.parent.iterdir()} == {entry.name, SOURCE}
