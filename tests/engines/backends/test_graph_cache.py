"""The graph cache on both backends: the same numbers without the work, and never those of another graph."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsast_engines.backends import graph_cache, onnxruntime, openvino
from lsast_engines.backends.graph_cache import DIGESTS, SOURCE
from lsast_engines.backends.registry import open_engine


class Case:
    """A backend: runs the graph, and counts how often it was built from the graph file."""

    def __init__(self, backend: str, graph: Any) -> None:
        self.backend, self.graph, self.folder = backend, graph, graph.path.parent
        self.module: Any = {"onnxruntime": onnxruntime, "openvino": openvino}[backend]
        self.builds = 0

    def run(self) -> np.ndarray:
        with closing(open_engine(self.graph.path, self.graph.spec, self.backend, threads=1)) as engine:
            return engine({"x": self.graph.x})["y"].copy()

    def entries(self) -> list[Path]:
        return sorted((self.folder.parent / "home" / "compiled" / self.backend).glob("*/*-*"))

    def open_cached(self, *arguments: Any) -> Any:
        *rest, build = arguments

        def count(entry: Path | None) -> Any:
            self.builds += 1
            return build(entry)

        return graph_cache.open_cached(*rest, count)


@pytest.fixture(params=["onnxruntime", "openvino"])
def case(request: pytest.FixtureRequest, product: Any, monkeypatch: pytest.MonkeyPatch) -> Case:
    case = Case(request.param, product)
    (case.folder / "manifest.json").write_text("{}")  # a bundle as far as the cache looks at it
    monkeypatch.setattr(case.module, "open_cached", case.open_cached)
    return case


def test_cache_builds_once_for_each_processor_and_dtype_and_gives_the_same_values(case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(graph_cache, "MAX_WEIGHT_BYTES", (case.folder / "product.data").stat().st_size)
        plain = case.run()
    assert (case.builds, case.entries()) == (1, [])  # entries of large weights would be as large
    for _ in range(3):
        np.testing.assert_array_equal(case.run(), plain)
    assert case.builds == 2
    (entry,) = case.entries()
    of_bf16 = entry.with_name(entry.name.replace("-fp32-", "-bf16-"))
    of_bf16.mkdir()
    monkeypatch.setattr(case.module, "processor", lambda: "another")
    case.run()
    entries = case.entries()
    assert (case.builds, of_bf16 in entries, entry in entries, len(entries)) == (3, True, False, 2)
    (case.folder / "manifest.json").unlink()  # a graph of no bundle
    case.run()
    assert (case.builds, case.entries()) == (4, entries)


def test_cache_replaces_the_entry_of_other_weights_even_of_the_same_size_and_time(case):
    def declare(seconds: int) -> None:
        names = ("product.onnx", "product.data")
        files = {name: {"sha256": hashlib.sha256((case.folder / name).read_bytes()).hexdigest()} for name in names}
        (case.folder / "manifest.json").write_text(json.dumps({"files": files}))
        os.utime(case.folder / "product.data", (seconds, seconds))

    declare(10**9)
    before = case.run()
    entries = [case.entries()]
    for seconds in (10**9, 10**9 + 1):
        content = bytearray((case.folder / "product.data").read_bytes())
        content[-1] ^= 128  # the sign of a weight
        (case.folder / "product.data").write_bytes(content)
        declare(seconds)
        assert (case.run() != before).any() == (seconds == 10**9)
        entries.append(case.entries())
    assert [len(found) for found in entries] == [1, 1, 1]
    assert len({entry for (entry,) in entries}) == 3


def test_cache_entry_that_a_backend_does_not_open_is_kept(case, monkeypatch):
    expected, entries = case.run(), case.entries()

    def fail(entry: Path) -> Any:
        raise RuntimeError("no threads left")

    with monkeypatch.context() as patch:
        patch.setattr(case.module, "open_cached", lambda *given: case.open_cached(*given[:4], fail, given[5]))
        np.testing.assert_array_equal(case.run(), expected)
    case.run()
    assert (case.builds, case.entries()) == (2, entries)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_cache_that_others_may_write_is_neither_read_nor_written(case, caplog):
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


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "pipe", "another's"])
def test_cache_reports_and_rebuilds_damaged_files(case, caplog, damage):
    expected = case.run()
    (entry,) = case.entries()
    names = [file.name for file in entry.iterdir()]
    assert {DIGESTS} < set(names)
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
        np.testing.assert_array_equal(case.run(), expected)
        assert "the graph is built again" in caplog.text
        assert (case.builds, case.entries()) == (count, [entry])
        np.testing.assert_array_equal(case.run(), expected)
        assert case.builds == count


def test_cache_that_cannot_be_written_does_not_stop_a_run(case, monkeypatch, tmp_path):
    expected = case.run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "compiled").write_text("no folder")
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "other"))
    np.testing.assert_array_equal(case.run(), expected)
    assert case.builds == 2


def test_open_cached_keeps_the_entry_of_a_quicker_process(product):
    (product.path.parent / "manifest.json").write_text("{}")
    arguments: tuple[Any, ...] = ("onnxruntime", product.path, "fp32", "any")
    entry = graph_cache.cache_path(*arguments)

    def build(fresh: Path | None) -> str:
        (fresh / "second").touch()
        entry.mkdir()
        (entry / "first").touch()
        return "session"

    load: Callable[[Path], str] = lambda entry: "loaded"  # noqa: E731
    assert graph_cache.open_cached(*arguments, load, build) == "session"
    assert [file.name for file in entry.iterdir()] == ["first"]
    assert {file.name for file in entry.parent.iterdir()} == {entry.name, SOURCE}
