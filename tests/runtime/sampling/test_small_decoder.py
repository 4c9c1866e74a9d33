"""The small decoder in the decoder's place: one that swaps red and blue, so that every picture says which one ran."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import lsast
from lsast import BundleError, Stylizer
from lsast.sessions.engine_pool import EngineFactory
from lsast.stylizer import first_graphs
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import VAE_DECODER_TINY, tiny_decoder_spec


@pytest.fixture(scope="session")
def small_path(tmp_path_factory: pytest.TempPathFactory, bundle_path: Path, graphs: dict[str, bytes]) -> Path:
    """The tiny bundle with a small decoder that swaps red and blue."""
    model = onnx.load_from_string(graphs["vae_decoder"])
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "decode_1x1"]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    manifest = Bundle.open(bundle_path).manifest
    spec = tiny_decoder_spec(manifest.geometry)
    files = {f"{name}.onnx": content for name, content in graphs.items()}
    sources: dict[str, Path | bytes] = {
        **files,
        f"{VAE_DECODER_TINY}.onnx": model.SerializeToString(),
        "null.safetensors": bundle_path / "null.safetensors",
        **{f"styles/{file.name}": file for file in bundle_path.glob("styles/*")},
    }
    folder = tmp_path_factory.mktemp("small") / "tiny"
    Bundle.write(folder, dataclasses.replace(manifest, graphs={**manifest.graphs, VAE_DECODER_TINY: spec}), sources)
    return folder


@pytest.fixture
def stylizer(small_path: Path) -> Iterator[Stylizer]:
    with lsast.load(small_path, threads=1) as opened:
        yield opened


def _pixels(result: lsast.Result) -> np.ndarray:
    return np.asarray(result.image).astype(int)


def _swapped(result: lsast.Result) -> np.ndarray:
    pixels = _pixels(result)
    assert np.abs(pixels - pixels[..., ::-1]).mean() > 1, "a grey picture proves nothing"
    return pixels[..., ::-1]


def test_small_decoder_is_opened_and_used_when_asked_for(stylizer: Stylizer, photo: np.ndarray) -> None:
    full = stylizer.stylize(photo, seed=3)
    assert VAE_DECODER_TINY not in stylizer._pool.engines
    assert (_pixels(stylizer.stylize(photo, seed=3, decoder="full")) == _pixels(full)).all()
    small = stylizer.stylize(photo, seed=3, decoder="small")
    assert (_pixels(small) == _swapped(full)).all()
    assert (full.options.decoder, small.options.decoder) == ("full", "small")
    assert (_pixels(stylizer.stylize(photo, seed=3)) == _pixels(full)).all()


def test_small_decoder_decodes_each_tile(stylizer: Stylizer) -> None:
    rows, columns = np.mgrid[0:128, 0:256]
    picture = np.stack([rows, columns, rows * columns % 256], axis=-1).astype(np.uint8)
    assert stylizer.request(picture, size=0, tile=128).grid
    full, small = (stylizer.stylize(picture, size=0, tile=128, decoder=name) for name in ("full", "small"))
    assert np.abs(_pixels(small) - _swapped(full)).max() <= 1


def test_stylize_many_shares_no_batch_between_decoders(stylizer: Stylizer, photo: np.ndarray, runs: list[Any]) -> None:
    rows: list[dict[str, Any]] = [{"decoder": "small"}, {"decoder": "small", "seed": 9}, {}]
    many = list(stylizer.stylize_many([photo] * 3, rows=rows, batch=4))
    assert [len(run.latents) for run in runs] == [2, 1]
    for row, result in zip(rows, many, strict=True):
        assert np.abs(_pixels(result) - _pixels(stylizer.stylize(photo, **row))).max() <= 1


def test_small_decoder_that_the_bundle_lacks_says_what_adds_it(bundle_path: Path, photo: np.ndarray) -> None:
    wanted = f"found no graph vae_decoder_tiny .* lsast-export decoder {re.escape(str(bundle_path))} --small FOLDER"
    with lsast.load(bundle_path, threads=1) as without, pytest.raises(BundleError, match=wanted):
        without.stylize(photo, decoder="small")


def test_first_graphs_are_those_that_the_options_need(small_path: Path, bundle_path: Path, photo: np.ndarray) -> None:
    bundle, without = Bundle.open(small_path), Bundle.open(bundle_path)
    assert first_graphs(bundle, {"decoder": "small"}) == [
        "vae_encoder",
        "controlnet_cond",
        "denoiser",
        VAE_DECODER_TINY,
    ]
    assert first_graphs(bundle, {}) == first_graphs(without, {"decoder": "small"})
    factory = EngineFactory(bundle, "onnxruntime", threads=1)
    with Stylizer(factory, first_graphs(bundle, {"decoder": "small"})) as stylizer:
        small = stylizer.stylize(photo, decoder="small")
        assert "vae_decoder" not in stylizer._pool.engines
        assert (_pixels(stylizer.stylize(photo)) == _swapped(small)).all()
