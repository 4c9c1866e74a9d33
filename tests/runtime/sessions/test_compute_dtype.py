"""Dtypes below fp32: asked for, refused, and overflowing."""

import logging
import pickle
import sys

import numpy as np
import pytest

import lsast
from lsast import BackendError, Stylizer
from lsast_engines.backends.base import Engine


def _overflow(stylizer: Stylizer, name: str) -> Engine:
    """Let an open graph give what is too large for fp16."""
    engine = stylizer._pool.engine(name)
    run = engine._run
    engine.compute_dtype = "fp16"
    engine._run = lambda feeds: {key: np.full_like(value, np.inf) for key, value in run(feeds).items()}  # type: ignore[method-assign]
    return engine


def test_stylize_with_a_decoder_that_overflows_decodes_again_in_fp32_and_stays_there(bundle_path, photo, caplog):
    caplog.set_level(logging.WARNING, "lsast")
    with lsast.load(bundle_path, backend="onnxruntime") as stylizer:
        expected = stylizer.stylize(photo).image
        engine = _overflow(stylizer, "vae_decoder")
        for _ in range(2):
            np.testing.assert_array_equal(stylizer.stylize(photo).image, expected)
        assert engine._closed
        assert stylizer._pool.engine("vae_decoder").compute_dtype == "fp32"
    (record,) = caplog.records
    assert "graph vae_decoder gave" in record.getMessage()
    assert "decoding again in fp32" in record.getMessage()


def test_stylize_with_another_graph_that_overflows_raises(bundle_path, photo):
    with lsast.load(bundle_path, backend="onnxruntime") as stylizer:
        _overflow(stylizer, "vae_encoder")
        with pytest.raises(BackendError, match=r"the graph vae_encoder gave .* in fp16; try compute_dtype fp32"):
            stylizer.stylize(photo)


def test_stylize_reads_only_the_stages_of_the_schedule(bundle_path, photo):
    with lsast.load(bundle_path) as stylizer:
        stylizer.stylize(photo, steps=10, strength=0.3, solver="ddim")  # t = 201, 101, 1
        assert sorted(stylizer._pool.styles.get("vangogh")._read) == [0, 1, 2]
        stylizer.stylize(photo, steps=10, strength=0.7, solver="ddim")
        assert sorted(stylizer._pool.styles.get("vangogh")._read) == [0, 1, 2, 3, 4, 5, 6]


def test_openvino_in_bf16_paints_the_same_after_a_small_picture():
    from lsast_engines.backends.openvino import compute_dtypes

    if "bf16" not in compute_dtypes("cpu"):
        pytest.skip("this processor has no bf16")
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    with lsast.load(backend="openvino", compute_dtype="bf16", threads=1) as stylizer:
        expected = stylizer.stylize(picture, size=256, steps=1).image
    with lsast.load(backend="openvino", compute_dtype="bf16", threads=1) as stylizer:
        stylizer.stylize(picture, size=64, steps=1)
        np.testing.assert_array_equal(stylizer.stylize(picture, size=256, steps=1).image, expected)


def test_auto_is_chosen_once_and_its_paintings_are_repeated_on_other_processors(run, photo, monkeypatch):
    for library in ("onnxruntime", "openvino"):
        pytest.importorskip(library)
    monkeypatch.setattr("lsast_engines.backends.openvino.compute_dtypes", lambda device: ("fp32", "bf16"))
    monkeypatch.setenv("LSAST_PROCESSOR", "avx512_bf16")
    with lsast.load() as stylizer:
        monkeypatch.setenv("LSAST_PROCESSOR", "avx2")
        first, other = stylizer.stylize(photo), stylizer.stylize(photo, seed=1)
        again = pickle.loads(pickle.dumps(stylizer))  # chooses where it is opened
    assert first.choice == other.choice == stylizer.choice
    assert (first.choice.backend, first.choice.compute_dtype) == ("openvino", "bf16")
    assert "avx512_bf16" in first.choice.reason
    assert (first.provenance.backend, first.provenance.compute_dtype) == ("openvino", "bf16")
    with again:
        assert (again.choice.backend, again.choice.compute_dtype) == ("onnxruntime", "fp32")
    first.save("out.png")
    call = ("--from", "out.png", "in.png")
    assert run(*call).exit_code == 0
    monkeypatch.setitem(sys.modules, "openvino", None)
    refused = run(*call)
    assert refused.exit_code == 1
    assert "add --backend auto --device auto --compute-dtype auto" in refused.stderr
    autos = ("--backend", "auto", "--device", "auto", "--compute-dtype", "auto")
    assert run(*call, "near.png", *autos).exit_code == 0
