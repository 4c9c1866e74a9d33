"""The default that ships: sound, small, and styles that paint one photograph differently."""

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

import lsast
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.bundle.graph_spec import UNET_SPLIT_GRAPHS

PHOTO = Path(__file__).parents[2] / "docs" / "images" / "lighthouse.jpg"
SIZE = 192
STYLES = ("vangogh", "monet", "cezanne", "roerich", "martin", "koson", "north")


@pytest.fixture(scope="module")
def painted() -> dict[tuple[str, int], npt.NDArray[np.float64]]:
    with lsast.load(backend="onnxruntime") as stylizer:
        return {
            (style, seed): blurred(stylizer.stylize(PHOTO, style=style, size=SIZE, seed=seed).image)
            for style in STYLES
            for seed in (0, 1)
        }


def blurred(image: Image.Image) -> npt.NDArray[np.float64]:
    """Palette and composition without strokes, [64, 96, 3]."""
    return np.asarray(image.filter(ImageFilter.GaussianBlur(8)).resize((96, 64)), dtype=np.float64)


def test_embedded_bundle_is_valid_small_and_has_seven_styles():
    bundle = Bundle.open(EMBEDDED)
    assert set(STYLES) <= bundle.styles().keys()
    for name in bundle.styles():
        assert bundle.open_style(name).latent_statistics is not None
        assert bundle.open_style(name).defaults["palette"] > 0
        bundle.style(name)
    assert sum(file.stat().st_size for file in EMBEDDED.rglob("*") if file.is_file()) < 60_000_000
    assert bundle.manifest.storage_dtype == "fp16"
    assert 0 < max(bundle.manifest.parity.values()) < 1e-4


def test_embedded_bundle_paints_nearly_the_same_with_its_split_graphs():
    bundle = Bundle.open(EMBEDDED)
    assert set(UNET_SPLIT_GRAPHS) < bundle.manifest.graphs.keys()
    # They refer into the base.
    assert sum(bundle.manifest.files[f"{name}.onnx"].bytes for name in UNET_SPLIT_GRAPHS) < 1_000_000
    options = {"style": "vangogh", "size": 128, "steps": 6, "strength": 0.9}
    with lsast.load(backend="onnxruntime", threads=2) as stylizer:
        exact, shallow, unguided = (
            np.asarray(stylizer.stylize(PHOTO, **options, **lever).image.resize((64, 64)), float)
            for lever in ({}, {"cache_interval": 2}, {"guidance": 1.0})
        )
    errors = [float(np.abs(exact - other).mean()) for other in (shallow, unguided)]
    assert 0 < errors[0] < errors[1] / 2, errors


def test_embedded_bundle_keeps_the_photograph_recognisable(painted):
    photo = blurred(Image.open(PHOTO))
    for (style, _), picture in painted.items():
        likeness = np.corrcoef(photo.mean(2).ravel(), picture.mean(2).ravel())[0, 1]
        assert likeness > (0.6 if style in ("vangogh", "monet") else 0.4), style
        assert np.abs(photo - picture).mean() > 5, style


def test_embedded_styles_differ_by_more_than_the_noise_does(painted):
    """The same seed in two styles: what their difference has in common for two seeds, against what it has not."""
    for one, other in itertools.combinations(STYLES, 2):
        first, second = (painted[one, seed] - painted[other, seed] for seed in (0, 1))
        of_styles, of_seeds = np.abs(first + second).mean(), np.abs(first - second).mean()
        assert of_styles > 1.5 * of_seeds, (one, other, of_styles / of_seeds)


def test_interrupt_after_close_reaches_python(python, bundle_path):
    """OpenVINO frees the signal stack that it gave the thread; a core kept alive keeps Ctrl-C from crashing."""
    program = """
import os, signal, sys, lsast
for _ in range(2):
    with lsast.load(sys.argv[1], backend="openvino") as stylizer:
        stylizer.stylize(sys.argv[2], size=64, strength=0.1)
signal.signal(signal.SIGINT, lambda *_: os._exit(7))
os.kill(os.getpid(), signal.SIGINT)
"""
    assert python(program, bundle_path, PHOTO).returncode == 7
