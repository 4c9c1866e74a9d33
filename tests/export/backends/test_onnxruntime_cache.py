"""Optimised graphs that ONNX Runtime keeps: the same bits without optimising, and never those of another graph."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsast_engines.backends import graph_cache as kept_graphs
from lsast_engines.backends import onnxruntime_cache
from lsast_engines.backends.base import open_engine
from lsast_engines.bundle.bundle import Bundle

onnxruntime = pytest.importorskip("onnxruntime")

Decode = Callable[[], np.ndarray]


@pytest.fixture(params=["fp32", "fp16"])
def bundle(bundles: dict[str, Bundle], tmp_path: Path, request: pytest.FixtureRequest) -> Bundle:
    """A bundle that a test may damage."""
    shutil.copytree(bundles[request.param].path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that sessions are opened of."""
    files: list[Path] = []

    real = onnxruntime.InferenceSession

    def session(path: Path, *rest: Any, **options: Any) -> Any:
        files.append(path)
        return real(path, *rest, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return files


@pytest.fixture
def decode(bundle: Bundle) -> Decode:
    """Opens the decoder and runs it."""
    latent = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)

    def run() -> np.ndarray:
        spec = bundle.manifest.graphs["vae_decoder"]
        with closing(open_engine(bundle.graph_path("vae_decoder"), spec, "onnxruntime", threads=1)) as engine:
            return engine({"latent": latent})["image"].copy()

    return run


def _kept() -> list[Path]:
    return sorted(Path(os.environ["LSAST_HOME"], "compiled", "onnxruntime").glob("*/*-*"))


def test_a_graph_is_optimised_once_and_computes_the_same(bundle: Bundle, opened: list[Path], decode: Decode) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_graphs, "LIMIT", 0)
        plain = decode()
    assert _kept() == []
    for _ in range(3):
        np.testing.assert_array_equal(decode(), plain)
    (kept,) = _kept()
    own = bundle.graph_path("vae_decoder")
    assert opened == [own, own, kept / onnxruntime_cache.GRAPH, kept / onnxruntime_cache.GRAPH]


def test_every_graph_of_a_bundle_is_kept(bundle: Bundle, opened: list[Path]) -> None:
    for _ in range(2):
        for name, spec in bundle.manifest.graphs.items():
            open_engine(bundle.graph_path(name), spec, "onnxruntime", threads=1).close()
    count = len(bundle.manifest.graphs)
    assert [bundle.path in path.parents for path in opened] == [True] * count + [False] * count
    assert len(_kept()) == count


def test_other_weights_are_optimised_and_take_the_place(bundle: Bundle, opened: list[Path], decode: Decode) -> None:
    before = decode()
    (old,) = _kept()
    weights = bundle.path / "base.safetensors"
    content = bytearray(weights.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    kind = np.float32 if bundle.manifest.storage_dtype == "fp32" else np.float16
    content[header:] = (np.frombuffer(content[header:], kind) / 2).astype(kind).tobytes()
    weights.write_bytes(content)
    assert np.abs(decode() - before).max() > 1e-3
    (new,) = _kept()
    assert new != old
    assert opened == [bundle.graph_path("vae_decoder")] * 2


def test_another_processor_is_optimised_for_anew(
    opened: list[Path], decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode()
    (old,) = _kept()
    monkeypatch.setattr(onnxruntime_cache, "processor", lambda: "another")
    decode()
    (new,) = _kept()
    assert new != old


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
@pytest.mark.parametrize("file", [onnxruntime_cache.GRAPH, onnxruntime_cache.WEIGHTS, onnxruntime_cache.DIGESTS])
def test_damaged_files_are_told_of_and_replaced(
    opened: list[Path], decode: Decode, caplog: pytest.LogCaptureFixture, damage: str, file: str
) -> None:
    expected = decode()
    (kept,) = _kept()
    content = bytearray((kept / file).read_bytes())
    half = len(content) // 2
    content[half] ^= 1
    if damage == "gone":
        (kept / file).unlink()
    else:
        (kept / file).write_bytes(content[:half] if damage == "cut" else content)
    with caplog.at_level(logging.WARNING, "lsast.onnxruntime"):
        np.testing.assert_array_equal(decode(), expected)
    assert "the graph is optimised anew" in caplog.text
    np.testing.assert_array_equal(decode(), expected)
    assert opened[2] == kept / onnxruntime_cache.GRAPH
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_where_nothing_can_be_kept_graphs_run_all_the_same(
    opened: list[Path], decode: Decode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = decode()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "file"))
    np.testing.assert_array_equal(decode(), expected)
    assert len(opened) == 2


def test_of_two_processes_at_once_one_keeps(bundle: Bundle, tmp_path: Path) -> None:
    import onnxruntime

    path = bundle.graph_path("vae_decoder")
    kept = kept_graphs.place("onnxruntime", path, "fp32", f"{onnxruntime.__version__} {onnxruntime_cache.processor()}")
    assert kept is not None

    def start(file: Path, options: Any) -> str:
        Path(options.optimized_model_filepath).write_bytes(b"second")
        kept.mkdir()
        (kept / "first").touch()
        return "session"

    assert onnxruntime_cache.optimised(onnxruntime, path, onnxruntime.SessionOptions, start) == "session"
    assert [file.name for file in kept.iterdir()] == ["first"]
    assert [folder.name for folder in kept.parent.iterdir()] == [kept.name]


def test_large_weights_and_graphs_of_no_bundle_are_not_kept(
    bundle: Bundle, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kept_graphs, "LIMIT", (bundle.path / "base.safetensors").stat().st_size)
        decode()
    (bundle.path / "manifest.json").unlink()
    decode()
    assert _kept() == []
