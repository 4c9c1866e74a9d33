import inspect
import io
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

import lsast
from lsast import UsageError
from lsast.options.options import rules


@pytest.mark.parametrize("own", [(160, 90), (90, 160), (50, 2000), (1, 1), (7, 5), (64, 64), (300, 301)])
@pytest.mark.parametrize("size", [0, 96])
def test_stylize_keeps_any_size_and_aspect(stylizer, own, size):
    rgb = np.random.default_rng(0).integers(0, 256, (*own, 3), dtype=np.uint8)
    assert np.asarray(stylizer.stylize(rgb, size=size)).shape == (*own, 3)


def test_stylize_paints_the_padding_without_showing_it(stylizer):
    """A picture that fills its canvas by itself, and one that is mirrored onto the same canvas, agree inside."""
    rng = np.random.default_rng(2)
    small = np.repeat(np.repeat(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), 8, axis=0), 8, axis=1)  # [48, 48, 3]
    whole = np.pad(small, [(8, 8), (8, 8), (0, 0)], mode="symmetric")
    inner = np.asarray(stylizer.stylize(whole, size=0))[8:56, 8:56]
    np.testing.assert_array_equal(np.asarray(stylizer.stylize(small, size=0)), inner)


def test_stylize_keeps_transparency_or_composites_on_white(stylizer, photo):
    alpha = np.tile(np.linspace(0, 255, 160).astype(np.uint8), (96, 1))
    rgba = np.dstack([photo, alpha])
    kept = stylizer.stylize(rgba)
    assert kept.image.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(kept)[..., 3], alpha)
    np.testing.assert_array_equal(np.asarray(kept)[..., :3], np.asarray(stylizer.stylize(photo)))

    laid = stylizer.stylize(rgba, alpha="composite")
    assert laid.image.mode == "RGB"
    on_white = np.round(photo * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(laid), np.asarray(stylizer.stylize(on_white)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_stylize_keeps_the_colour_profile(stylizer, photo, tmp_path, suffix):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    held = io.BytesIO()
    Image.fromarray(photo).save(held, format="PNG", icc_profile=icc)
    for source, expected in ((held.getvalue(), icc), (photo, None)):
        stylizer.stylize(source).save(tmp_path / f"out.{suffix}")
        with Image.open(tmp_path / f"out.{suffix}") as saved:
            assert saved.info.get("icc_profile") == expected


def test_stylize_refuses_removed_options_by_name(stylizer, photo):
    old: dict[str, Any] = {"control_low": 300, "control_interval": 2, "guidance_low": 1, "guidance_high": 700}
    with pytest.raises(UsageError, match="control_low was removed: use a smaller control_scale") as caught:
        stylizer.stylize(photo, **old)
    assert all(f"  - {name} was removed" in str(caught.value) for name in old)
    with pytest.raises(UsageError, match="control_low was removed"):
        list(stylizer.stylize_many([photo], **old))


def test_stylize_names_unknown_options_styles_presets_and_values_at_once(stylizer, photo):
    with pytest.raises(UsageError) as caught:
        stylizer.stylize(photo, "picasso+degas", steps=0, preset="sdxl", stepps=1, colour="red")
    heading, *lines = str(caught.value).split("\n")
    assert heading == "invalid options:"
    faults = [line.split("; ")[0] for line in lines if line.startswith("  - ")]
    assert faults[:3] == ["  - steps: found 0", "  - preset: found 'sdxl'", "  - stepps: unknown"]
    assert faults[3] == "  - colour: unknown"
    assert [fault.split(" for ")[0] for fault in faults[4:]] == [
        "  - style: found no style 'picasso'", "  - style: found no style 'degas'",
    ]  # fmt: skip


def test_load_names_all_wrong_arguments_at_once(bundle_path):
    for threads in (0, 10**12, 1.5, 2.0, True, "2"):
        with pytest.raises(UsageError) as caught:
            lsast.load(bundle_path, backend=3, threads=threads, options=5)
        assert [line.split(";")[0] for line in str(caught.value).split("\n")[1:]] == [
            "  - backend: found 3", f"  - threads: found {threads!r}", "  - options: found int",
        ]  # fmt: skip
    lsast.load(bundle_path, threads=np.int64(1)).close()  # backends refuse whole numbers of NumPy


def test_stylize_without_a_style_or_a_default_lists_the_styles(stylizer, photo, monkeypatch):
    monkeypatch.setitem(stylizer.bundle.manifest.defaults, "style", "none")  # as export_bundle writes it without one
    with pytest.raises(UsageError, match=r"style: found none; expected one of monet, vangogh$"):
        stylizer.stylize(photo)
    monkeypatch.setitem(stylizer.bundle.manifest.defaults, "style", "monett")
    with pytest.raises(UsageError, match=r"style: found no style 'monett' .*; did you mean monet\?"):
        stylizer.stylize(photo)


WRONG = [[], {}, object(), b"x", math.nan, 10**5000, -1, 1j, {1}, np.zeros(3), Fraction(10**400), "?", Decimal(1)]
"""What no argument may be."""


@pytest.mark.parametrize("name", [*inspect.signature(lsast.load).parameters, *rules(), "on_step", "cancel", "mask"])
def test_every_argument_of_a_wrong_type_or_range_is_refused_by_name(stylizer, bundle_path, photo, name):
    def use(value: Any) -> None:
        if name in inspect.signature(lsast.load).parameters and name != "preset":
            lsast.load(**{"bundle": bundle_path, "backend": "onnxruntime", name: value})
        else:
            stylizer.stylize(photo, **{"size": 64, name: value})

    for value in WRONG:
        if name != "options" or not isinstance(value, dict):
            with pytest.raises(lsast.LsastError, match=name):
                use(value)


def test_stylize_with_fit_stretch_gives_a_square(stylizer, photo):
    rgba = np.dstack([photo, np.full(photo.shape[:2], 90, np.uint8)])
    result = stylizer.stylize(rgba, fit="stretch", size=128)
    assert (result.image.size, result.image.mode) == ((128, 128), "RGBA")
    assert (np.asarray(result)[..., 3] == 90).all()
    # Squashing a picture of that very size changes nothing.
    square = photo[:64, 30:94]
    plain, stretched = (stylizer.stylize(square, fit=fit, size=64) for fit in ("aspect", "stretch"))
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(stretched))


def test_stylize_with_fit_stretch_finds_edges_in_the_bilinear_picture(stylizer, photo, runs):
    # docs/method.md §4.1-2: Pillow's Lanczos for the encoder, OpenCV's bilinear on BGR for the edges.
    stylizer.stylize(photo, fit="stretch", size=120)
    (edges,), (rgb,) = runs[0].batch.edges, runs[0].batch.pictures
    bilinear = cv2.resize(np.ascontiguousarray(photo[..., ::-1]), (128, 128))
    np.testing.assert_array_equal(edges, cv2.Canny(bilinear, 100, 200) > 0)
    np.testing.assert_array_equal(rgb, Image.fromarray(photo).resize((128, 128), Image.Resampling.LANCZOS))
    assert (edges != (cv2.Canny(rgb, 100, 200) > 0)).any(), "Lanczos would do as well: no proof"
