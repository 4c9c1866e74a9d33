import contextlib
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

import lsast
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.bundle.style import encode_defaults
from lsast_engines.errors import BackendError, UsageError
from lsast_export.quantize.options import QuantizeOptions
from lsast_export.quantize.paintings import load_calibration_images, paint
from lsast_export.quantize.quantize import quantize_bundle


def test_paint_gives_the_paintings_of_the_runtime_with_palettes_and_counts_every_step():
    bundle, shown = Bundle.open(EMBEDDED), []
    contents, _ = load_calibration_images(None, 3, 64)
    found = paint(
        bundle,
        contents,
        ["vangogh", "monet"],
        "onnxruntime",
        seed=5,
        steps=3,
        strength=1.0,
        progress=lambda phase, detail: shown.append((phase, detail.split(",")[0])),
    )
    with lsast.load(backend="onnxruntime", compute_dtype="fp32") as stylizer:
        assert stylizer.resolve(style="monet").palette > 0  # one is in the comparison
        for index, (rgb, style) in enumerate(zip(contents, ("vangogh", "monet", "vangogh"), strict=True)):
            expected = stylizer.stylize(rgb, style, size=64, seed=5 + index, steps=3, strength=1.0)
            np.testing.assert_array_equal(found[index], expected)
    assert shown == [("painting", f"step {step} of 9") for step in range(1, 10)]


@pytest.mark.parametrize(
    ("backend", "options", "error"),
    [
        ("onnxruntime", {}, None),
        ("onnxruntime", {"strength": 7}, UsageError),
        ("abacus", {}, (BackendError, UsageError)),
    ],
)
def test_paint_runs_given_engines_and_closes_them_also_after_an_error(bundles, backend, options, error):
    bundle = bundles["fp32"]
    contents, _ = load_calibration_images(None, 1, 64)
    engine = open_engine(bundle.graph_path("denoiser"), bundle.manifest.graphs["denoiser"], "onnxruntime", "cpu")
    run, ran = engine._run, []
    engine._run = lambda feeds: ran.append(1) or run(feeds)
    with pytest.raises(error) if error else contextlib.nullcontext():
        paint(bundle, contents, ["hand"], backend, {"denoiser": engine}, **options)
    assert bool(ran) == (error is None)
    with pytest.raises(BackendError, match="is closed"):
        engine({})


def test_quantize_names_the_style_whose_own_defaults_are_invalid_before_it_calibrates(bundles, tmp_path):
    folder = Path(shutil.copytree(bundles["fp32"].path, tmp_path / "wrong"))
    style, own = bundles["fp32"].style("hand"), encode_defaults({"control_scale": 3.0})
    dataclasses.replace(style, meta={**style.meta, **own}).save(folder / "styles" / "hand.safetensors")
    phases = []
    with pytest.raises(UsageError, match=r"(?s)style hand: .*control_scale: found 3.0"):
        quantize_bundle(Bundle.open(folder), tmp_path / "int8", QuantizeOptions(size=64), progress=phases.append)
    assert "calibrating" not in phases


def test_quantize_without_a_style_that_could_be_painted_says_so(bundles, tmp_path):
    shutil.copytree(bundles["fp32"].path, tmp_path / "hidden")
    styles = tmp_path / "hidden" / "styles"
    (styles / "hand.safetensors").rename(styles / ".hand.safetensors")
    with pytest.raises(UsageError, match="found no style in it"):
        quantize_bundle(Bundle.open(tmp_path / "hidden"), tmp_path / "int8", QuantizeOptions(size=64))
