"""Arithmetic below fp32: asked for, refused, and overflowing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import lsast
from lsast import BackendError, Stylizer, UsageError
from lsast.cli.main import main
from lsast.sessions.engine_pool import Opener
from lsast_engines.backends.base import Engine, open_engine
from lsast_engines.bundle.bundle import Bundle


class Overflowing:
    """A decoder in fp16 whose values are too large for it."""

    backend = "openvino"
    compute_dtype = "fp16"

    def __init__(self, engine: Engine) -> None:
        self.spec = engine.spec
        self.closed = False
        self._engine = engine

    def __call__(self, feeds: Any) -> dict[str, np.ndarray]:
        image = self._engine(feeds)["image"].copy()
        image[..., 0] = np.inf
        return {"image": image}

    def release_memory(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


Open = Callable[[str], Engine]


@pytest.fixture
def open_graph(bundle_path: Path) -> Open:
    bundle = Bundle.open(bundle_path)
    return lambda name: open_engine(bundle.graph_path(name), bundle.manifest.graphs[name], "onnxruntime")


def test_decoder_that_overflows_is_asked_again_in_fp32_and_stays_there(
    bundle_path: Path, open_graph: Open, photo: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[tuple[str, str | None]] = []

    class Noted(Opener):
        def __call__(self, name: str, compute_dtype: Any = None) -> Engine:
            opened.append((name, compute_dtype))
            return super().__call__(name, compute_dtype)

    engines: dict[str, Any] = {
        name: open_graph(name) for name in ("vae_encoder", "controlnet_cond", "denoiser", "vae_decoder")
    }
    low = engines["vae_decoder"] = Overflowing(engines["vae_decoder"])
    with lsast.load(bundle_path, backend="onnxruntime") as plain:
        expected = np.asarray(plain.stylize(photo).image)
    caplog.set_level(logging.WARNING, "lsast")
    with Stylizer(Noted(Bundle.open(bundle_path), "onnxruntime"), engines) as stylizer:
        first = np.asarray(stylizer.stylize(photo).image)
        second = np.asarray(stylizer.stylize(photo).image)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    assert opened == [("vae_decoder", "fp32")]
    assert low.closed
    (record,) = caplog.records
    assert "decoder graph gave" in record.getMessage()
    assert "decoding again in fp32" in record.getMessage()


def test_any_other_graph_that_overflows_is_an_error(bundle_path: Path, open_graph: Open, photo: np.ndarray) -> None:
    class Encoder(Overflowing):
        def __call__(self, feeds: Any) -> dict[str, np.ndarray]:
            return {name: values * np.nan for name, values in self._engine(feeds).items()}

    engines: dict[str, Any] = {
        name: open_graph(name) for name in ("vae_encoder", "controlnet_cond", "denoiser", "vae_decoder")
    }
    engines["vae_encoder"] = Encoder(engines["vae_encoder"])
    stylizer = Stylizer(Opener(Bundle.open(bundle_path), "onnxruntime"), engines)
    with stylizer, pytest.raises(BackendError, match=r"the vae_encoder graph gave .* in fp16; try compute_dtype fp32"):
        stylizer.stylize(photo)


def test_only_the_stages_of_the_schedule_are_read(bundle_path: Path, photo: np.ndarray) -> None:
    with lsast.load(bundle_path) as stylizer:
        stylizer.stylize(photo, steps=10, strength=0.3, solver="ddim")  # t = 201, 101, 1
        assert stylizer._workshop.shelf["vangogh"].read_stages == [0, 1, 2]
        stylizer.stylize(photo, steps=10, strength=0.7, solver="ddim")
        assert stylizer._workshop.shelf["vangogh"].read_stages == [0, 1, 2, 3, 4, 5, 6]


def test_arithmetic_that_is_not_there_is_refused(bundle_path: Path) -> None:
    with pytest.raises(UsageError, match="found compute_dtype 'int3'; expected one of fp32, bf16, fp16"):
        lsast.load(bundle_path, compute_dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="onnxruntime computes in fp32, found bf16; use openvino"):
        lsast.load(bundle_path, backend="onnxruntime", compute_dtype="bf16")


def test_command_line_hands_the_arithmetic_on(bundle_path: Path, photo: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "in.png")
    arguments = [str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--bundle", str(bundle_path)]
    arguments += ["--backend", "onnxruntime", "--compute-dtype"]
    refused = CliRunner().invoke(main, [*arguments, "bf16"])
    assert refused.exit_code == 1
    assert "onnxruntime computes in fp32, found bf16" in refused.stderr
    assert not (tmp_path / "out.png").exists()
    assert CliRunner().invoke(main, [*arguments, "fp32"]).exit_code == 0
    assert (tmp_path / "out.png").exists()
