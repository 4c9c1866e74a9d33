"""Compiled graphs that OpenVINO keeps: the same numbers without compiling, and never those of another graph."""

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
from lsast_engines.backends.base import open_engine
from lsast_engines.backends.openvino import shared_core
from lsast_engines.bundle.bundle import Bundle

library = pytest.importorskip("openvino")


class CountingCore:
    """OpenVINO's core, which counts what it compiles."""

    def __init__(self) -> None:
        self.compiled = 0

    def compile_model(self, *arguments: Any) -> Any:
        self.compiled += 1
        return shared_core(library).compile_model(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(shared_core(library), name)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> CountingCore:
    counting = CountingCore()
    monkeypatch.setattr("lsast_engines.backends.openvino.shared_core", lambda _: counting)
    return counting


@pytest.fixture
def bundle(bundles: dict[str, Bundle], tmp_path: Path) -> Bundle:
    """A bundle that a test may damage."""
    shutil.copytree(bundles["fp32"].path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


@pytest.fixture
def decode(bundle: Bundle) -> Callable[..., np.ndarray]:
    """Opens the decoder and runs it."""
    latent = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)

    def run(**where: Any) -> np.ndarray:
        spec = bundle.manifest.graphs["vae_decoder"]
        with closing(open_engine(bundle.graph_path("vae_decoder"), spec, "openvino", threads=1, **where)) as engine:
            return engine({"latent": latent})["image"].copy()

    return run


def _kept() -> list[Path]:
    return sorted(Path(os.environ["LSAST_HOME"]).rglob("*.blob"))


def test_a_graph_is_compiled_once_and_computes_the_same(core: CountingCore, decode: Callable[..., np.ndarray]) -> None:
    first = decode()
    assert (core.compiled, len(_kept())) == (1, 1)
    np.testing.assert_array_equal(decode(), first)
    np.testing.assert_array_equal(decode(), first)
    assert core.compiled == 1


def test_every_graph_of_a_bundle_is_kept(core: CountingCore, bundle: Bundle) -> None:
    for _ in range(2):
        for name, spec in bundle.manifest.graphs.items():
            open_engine(bundle.graph_path(name), spec, "openvino", threads=1).close()
    assert core.compiled == len(bundle.manifest.graphs) == len(_kept())


def test_other_weights_are_compiled_and_take_the_place(
    core: CountingCore, bundle: Bundle, decode: Callable[..., np.ndarray]
) -> None:
    before = decode()
    (old,) = _kept()
    weights = bundle.path / "base.safetensors"
    content = bytearray(weights.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header:] = (np.frombuffer(content[header:], np.float32) / 2).tobytes()
    weights.write_bytes(content)
    after = decode()
    assert core.compiled == 2
    assert np.abs(after - before).max() > 1e-3
    (new,) = _kept()
    assert new != old


def test_every_arithmetic_has_a_file_of_its_own(core: CountingCore, decode: Callable[..., np.ndarray]) -> None:
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("needs a CPU that computes in bf16")
    full, half = decode(), decode(compute_dtype="bf16")
    assert (core.compiled, len(_kept())) == (2, 2)
    assert not np.array_equal(full, half)
    np.testing.assert_array_equal(decode(), full)
    np.testing.assert_array_equal(decode(compute_dtype="bf16"), half)
    assert core.compiled == 2


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_told_of_and_replaced(
    core: CountingCore, decode: Callable[..., np.ndarray], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = decode()
    (kept,) = _kept()
    content = bytearray(kept.read_bytes())
    size = len(content)
    content[size // 2] ^= 1
    kept.write_bytes(content[: size // 2] if damage == "cut" else content)
    with caplog.at_level(logging.WARNING, "lsast.openvino"):
        np.testing.assert_array_equal(decode(), expected)
    assert "the graph is compiled anew" in caplog.text
    assert core.compiled == 2
    assert len(_kept()) == 1
    # What OpenVINO compiles anew may differ by some bytes: it is in order if the next one opens it.
    np.testing.assert_array_equal(decode(), expected)
    assert core.compiled == 2


def test_where_nothing_can_be_kept_graphs_run_all_the_same(
    core: CountingCore, decode: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = decode()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "file"))
    np.testing.assert_array_equal(decode(), expected)
    assert core.compiled == 2


def test_large_weights_and_graphs_of_no_bundle_are_not_kept(
    core: CountingCore, bundle: Bundle, decode: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kept_graphs, "LIMIT", (bundle.path / "base.safetensors").stat().st_size)
        decode()
    (bundle.path / "manifest.json").unlink()
    decode()
    assert (core.compiled, _kept()) == (2, [])
