"""The graphs that step caching opens; and the small decoder, which swaps red and blue, so that every picture says which
one ran. `test_sampler` compares step caching with the algorithm, `test_tiling` both with what is painted whole."""

import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import lsast
from lsast import BundleError, Stylizer, UsageError
from lsast.options.options import PRESETS
from lsast.request import require_graphs
from lsast_engines.backends.registry import available_backends
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS, UNET_SPLIT_GRAPHS, VAE_DECODER_TINY


@pytest.fixture(params=sorted({"onnxruntime", "openvino"} & available_backends().keys()))
def split(request: pytest.FixtureRequest, split_path: Path) -> Iterator[Stylizer]:
    with lsast.load(split_path, backend=request.param, threads=1) as opened:
        yield opened


def _pixels(result: lsast.Result) -> np.ndarray:
    return np.asarray(result.image).astype(int)


def test_stylize_without_cache_interval_opens_no_split_graph(split, bundle_path, photo):
    with lsast.load(bundle_path, backend=split.backend, threads=1) as without:
        expected = _pixels(without.stylize(photo, seed=3))
    assert (_pixels(split.stylize(photo, seed=3)) == expected).all()
    assert set(split._pool.engines) == {*REQUIRED_GRAPHS}
    split.stylize(photo, cache_interval=2)
    assert set(split._pool.engines) == {*REQUIRED_GRAPHS, *UNET_SPLIT_GRAPHS}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            {"cache_interval": 2},
            "found no graph controlnet, .* which cache_interval needs; .* "
            "lsast-export bundle --base {0} --out {0} --storage-dtype fp32",
        ),
        ({"decoder": "small"}, "found no graph vae_decoder_tiny .* lsast-export decoder {} --small FOLDER"),
    ],
)
def test_option_whose_graphs_the_bundle_lacks_says_what_adds_them(stylizer, bundle_path, photo, option, words):
    words = words.format(re.escape(str(bundle_path)))
    for use in (stylizer.resolve, partial(stylizer.stylize, photo)):
        with pytest.raises(BundleError, match=words):
            use(**option)


def test_bundle_in_int8_without_split_graphs_is_to_be_quantized_again_not_replaced(stylizer, bundle_path):
    quantized = Bundle.open(bundle_path)
    quantized.manifest = replace(quantized.manifest, storage_dtype="int8")
    options = replace(stylizer.resolve(), cache_interval=2)
    words = f"lsast-export bundle --base FOLDER --out FOLDER; lsast-export quantize FOLDER --out {bundle_path}"
    with pytest.raises(BundleError, match=re.escape(words)):
        require_graphs(quantized, options)


def test_load_with_a_preset_opens_its_graphs_and_reports_it(split_path, photo):
    with lsast.load(split_path, threads=1, preset="fast") as stylizer:
        assert set(stylizer._pool.engines) == {*REQUIRED_GRAPHS, *UNET_SPLIT_GRAPHS} - {"denoiser"}
        found = stylizer.stylize(photo)
        assert "denoiser" not in stylizer._pool.engines  # its weights are in memory once
        exact = stylizer.stylize(photo, preset="exact", seed=0)
        again = pickle.loads(pickle.dumps(stylizer))
    with again, lsast.load(split_path, threads=1) as plain:
        expected = plain.stylize(photo, **PRESETS["fast"])
        assert (_pixels(found) == _pixels(expected)).all()
        assert (_pixels(again.stylize(photo)) == _pixels(expected)).all()
        assert (_pixels(exact) == _pixels(plain.stylize(photo))).all()
        assert found.options.preset == "fast"
        assert (_pixels(plain.stylize(photo, **vars(found.options))) == _pixels(expected)).all()
    with pytest.raises(UsageError, match="found 'swift'; expected exact, balanced, fast, gentle or released"):
        lsast.load(split_path, preset="swift")


def test_small_decoder_is_opened_and_used_when_asked_for(split, photo):
    full = split.stylize(photo, seed=3)
    assert VAE_DECODER_TINY not in split._pool.engines
    assert (_pixels(split.stylize(photo, seed=3, decoder="full")) == _pixels(full)).all()
    small = split.stylize(photo, seed=3, decoder="small")
    assert (_pixels(small) == _pixels(full)[..., ::-1]).all()
    assert np.abs(_pixels(small) - _pixels(full)).mean() > 1, "a grey picture proves nothing"
    assert (full.options.decoder, small.options.decoder) == ("full", "small")
    assert (_pixels(split.stylize(photo, seed=3)) == _pixels(full)).all()
