import importlib.util
import io
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from hostile import png_file
from lsast_engines.errors import LsastError, PictureError
from lsast_engines.images import canny_edges, find_pictures, import_opencv, read_picture

U8 = npt.NDArray[np.uint8]


def noise(height: int = 6, width: int = 9, channels: int = 3, high: int = 256) -> npt.NDArray[Any]:
    dtype = np.uint8 if high == 256 else np.uint16
    return np.random.default_rng(0).integers(0, high, (height, width, channels), dtype=dtype)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int = 32, width: int = 48) -> U8:
    """A picture that JPEG keeps."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) * 2], axis=2).astype(np.uint8)


def test_read_picture_of_any_source_gives_rgb(tmp_path):
    pixels, path = noise(), tmp_path / "a.png"
    file = encoded(Image.fromarray(pixels))
    path.write_bytes(file)
    paths: list[Any] = [path, str(path), np.str_(path), *os.scandir(os.fsencode(tmp_path))]  # the last one of bytes
    spread = memoryview(np.frombuffer(file, np.uint8).repeat(2))[::2]
    buffers = [file, bytearray(file), memoryview(file), spread, io.BytesIO(file)]
    arrays = [pixels, pixels[::-1, ::-1][::-1, ::-1], pixels.astype(np.float32) / 255, torch.from_numpy(pixels)]
    arrays += [SimpleNamespace(__array_interface__=pixels.__array_interface__)]
    arrays += [(pixels.astype(np.uint16) * 257).astype(dtype) for dtype in (np.uint16, ">u2")]
    with path.open("rb") as handle:
        for source in (*paths, *buffers, handle, Image.fromarray(pixels), *arrays):
            picture = read_picture(source)
            np.testing.assert_array_equal(picture.rgb, pixels)
            assert picture.rgb.dtype == np.uint8
            assert (picture.alpha, picture.icc, picture.size) == (None, None, (6, 9))
            assert picture.rgb.flags.c_contiguous
    mask = pixels[..., 0] > 99
    np.testing.assert_array_equal(read_picture(mask).rgb, np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))
    with pytest.deprecated_call():
        matrix = np.asmatrix(pixels[..., 0])
    np.testing.assert_array_equal(read_picture(matrix).rgb[..., 2], pixels[..., 0])
    one = read_picture(Image.new("RGB", (1, 1), (1, 2, 3))).rgb
    assert (one.tolist(), canny_edges(one).tolist()) == ([[[1, 2, 3]]], [[0]])
    closed, shut = io.BytesIO(file), Image.open(path)
    closed.close()
    shut.close()
    for source, words in (
        (io.StringIO("text"), "expected one opened as binary"),
        (5, "found int; expected a path"),
        (closed, r"cannot be read \(I/O operation on closed file.*\); expected an open one"),
        (shut, "Operation on closed image"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels; expected at least one"),
    ):
        with pytest.raises(PictureError, match=words):
            read_picture(source)


def test_read_picture_of_grey_gives_rgb_and_alpha():
    grey = noise(channels=2)
    files = [encoded(Image.fromarray(pixels)) for pixels in (grey[..., 0], grey)]
    for source in (grey[..., 0], *files):
        picture = read_picture(source)
        np.testing.assert_array_equal(picture.rgb, np.repeat(grey[..., :1], 3, axis=2))
    np.testing.assert_array_equal(picture.alpha, grey[..., 1])
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_picture(encoded(Image.fromarray(grey[..., 0]), icc_profile=icc)).icc is None
    assert read_picture(Image.fromarray(grey).convert("La")).alpha is not None


def test_read_picture_keeps_alpha_unless_opaque():
    pixels = noise(channels=4)
    for source in (pixels, encoded(Image.fromarray(pixels))):
        picture = read_picture(source)
        np.testing.assert_array_equal(np.dstack([picture.rgb, picture.alpha]), pixels)
    opaque = pixels.copy()
    opaque[..., 3] = 255
    assert read_picture(encoded(Image.fromarray(opaque))).alpha is None


def test_read_picture_of_a_palette_gives_rgb_and_alpha():
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for kind, transparency, alpha in (
        ("PNG", 1, [[255, 0], [255, 0]]),
        ("PNG", bytes([255, 128, 0]), [[255, 128], [0, 128]]),
        ("GIF", 1, [[255, 0], [255, 0]]),
    ):
        picture = read_picture(encoded(image, kind, transparency=transparency))
        assert picture.rgb[0, 0].tolist() == [10, 20, 30]
        assert picture.rgb[1, 0].tolist() == [70, 80, 90]
        assert picture.alpha.tolist() == alpha
    assert read_picture(encoded(image)).alpha is None


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_read_picture_of_16_bits_scales_by_the_full_range(suffix):
    grey = noise(channels=1, high=65536)[..., 0]
    for values in (grey, grey % 200):  # a dark picture stays dark
        picture = read_picture(cv2.imencode(suffix, values)[1].tobytes())
        assert np.abs(picture.rgb - values[..., None] / 257).max() <= 0.5
    colour = noise(high=65536)
    picture = read_picture(cv2.imencode(suffix, colour)[1].tobytes())
    # Pillow drops the low byte of colour.
    assert np.abs(picture.rgb - colour[..., ::-1] / 257).max() < 1


def test_read_picture_of_a_16_bit_png_keeps_alpha():
    grey = noise(3, 4, 2, high=65536)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey)
    picture = read_picture(png_file(4, 3, 16, 4, rows))
    assert np.abs(picture.rgb - grey[..., :1] / 257).max() < 1
    assert np.abs(picture.alpha - grey[..., 1] / 257).max() < 1


def test_read_picture_of_a_float_tiff_scales_to_8_bits():
    values = np.array([[0, 0.25], [0.5, 1]], np.float32)
    assert read_picture(encoded(Image.fromarray(values), "TIFF")).rgb[..., 0].tolist() == [[0, 64], [128, 255]]
    assert read_picture(encoded(Image.fromarray(values * 255), "TIFF")).rgb[..., 0].tolist() == [[0, 64], [128, 255]]
    values[0, 0] = np.nan
    with pytest.raises(PictureError, match="NaN or infinite"):
        read_picture(encoded(Image.fromarray(values), "TIFF"))


def test_read_picture_of_cmyk_and_lab_gives_rgb():
    pixels = smooth()
    picture = read_picture(encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(picture.rgb.astype(int) - pixels).max() <= 4
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(pixels), srgb, lab, outputMode="LAB")
    picture = read_picture(encoded(image, "TIFF", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes()))
    assert np.abs(picture.rgb.astype(int) - pixels).mean() < 2
    assert picture.icc is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_picture_applies_the_exif_orientation(orientation):
    stored = np.dstack([smooth(), noise(32, 48, 1)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(stored)
    for kind, options in (
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True, "exact": True}),
    ):
        source = image.convert("RGB") if kind == "JPEG" else image
        file = encoded(source, kind, exif=exif, icc_profile=icc, **options)
        picture, pixels = read_picture(file), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))))
        assert picture.size == pixels.shape[:2] == ((48, 32) if orientation > 4 else (32, 48))
        if kind == "JPEG":
            np.testing.assert_array_equal(picture.rgb, pixels)
        else:
            np.testing.assert_array_equal(np.dstack([picture.rgb, picture.alpha]), pixels)
        assert picture.icc == icc


def test_read_picture_ignores_damaged_exif(monkeypatch):
    def fail(image: Image.Image) -> Image.Exif:
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    pixels = noise()
    np.testing.assert_array_equal(read_picture(encoded(Image.fromarray(pixels))).rgb, pixels)


def test_read_picture_of_unreadable_sources_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for source, words in (
        (tmp_path / "absent.png", r"found no file .*absent.png; expected a picture"),
        (tmp_path, "cannot be decoded" if sys.platform == "win32" else "found the folder"),
        (tmp_path / "text.png", "text.png is not a picture that Pillow can read"),
        (b"", "not a picture"),
    ):
        with pytest.raises(PictureError, match=words):
            read_picture(source)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        whole = encoded(Image.fromarray(smooth()), kind)
        with pytest.raises(PictureError):
            read_picture(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5, 2), np.uint8), r"found an array of shape \(4, 5, 2\); expected \[H, W, 3\]"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
        (np.zeros((4, 5, 3), np.int64), "found an array of int64; expected bool, uint8, uint16 or float"),
        (np.full((4, 5, 3), 2.0), r"values outside \[0, 1\]"),
        (np.full((4, 5, 3), np.nan), r"values outside \[0, 1\]"),
    ],
)
def test_read_picture_of_invalid_arrays_is_refused(array, message):
    with pytest.raises(PictureError, match=message):
        read_picture(array)


def test_find_pictures_lists_images_sorted(tmp_path):
    for name in ("b.JPG", "a/c.png", "a/.hidden.png", ".thumbs/d.png", "notes.txt", "e.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert find_pictures(tmp_path) == [tmp_path / name for name in ("a/c.png", "b.JPG", "e.tiff")]
    for name, words in (
        ("b.JPG", r"found the file .*b.JPG; expected a folder of pictures"),
        ("gone", r"found no folder .*gone; expected a folder of pictures"),
        ("folder.png", r"found no picture under .*; expected files like \.jpg"),
    ):
        with pytest.raises(PictureError, match=words):
            find_pictures(tmp_path / name)


def test_canny_edges_of_a_square_are_its_border():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:24, 8:24] = 255
    edges = canny_edges(pixels)
    assert (edges.dtype, set(np.unique(edges))) == (np.uint8, {0, 1})
    border = np.zeros((32, 32), bool)
    border[7:25, 7:25] = True
    border[9:23, 9:23] = False
    assert not edges[~border].any()
    assert 40 < edges.sum() < 80
    assert canny_edges(pixels // 16).sum() == 0


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
METAFILE = b"\xd7\xcd\xc6\x9a\0\0" + bytes(100)


@pytest.mark.parametrize("data", [POSTSCRIPT, METAFILE])
def test_read_picture_of_a_program_starts_no_other_program(tmp_path, monkeypatch, data):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started {args}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    (tmp_path / "photo.jpg").write_bytes(data)
    for source in (tmp_path / "photo.jpg", data, io.BytesIO(data)):
        with pytest.raises(PictureError, match="not a picture that Pillow can read"):
            read_picture(source)
    if data is POSTSCRIPT:
        with pytest.raises(PictureError, match="found a picture of format EPS"):
            read_picture(Image.open(io.BytesIO(data)))


def test_read_picture_leaves_the_warnings_of_the_process_alone(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # from which on Pillow warns
    before = list(warnings.filters)
    assert read_picture(encoded(Image.fromarray(noise()))).size == (6, 9)
    assert warnings.filters == before


@pytest.mark.parametrize(("kind", "megapixels"), [(2, 121), (0, 212), (6, 106)])
def test_read_picture_bounds_the_pixels_before_decoding(kind, megapixels):
    with pytest.raises(PictureError, match=rf"20000 x 20000 pixels, 400 megapixels .*expected at most {megapixels}:"):
        read_picture(png_file(20000, 20000, colour=kind))
    with pytest.raises(PictureError, match="cannot be decoded"):  # within the limit: decoded, and found empty
        read_picture(png_file(10000, 10000, colour=kind))
    with pytest.raises(PictureError, match="expected at most"):
        read_picture(encoded(Image.fromarray(noise())), max_megapixels=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_read_picture_of_grey_uses_its_profile(mode):
    icc = gamma_profile()
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    source = Image.fromarray(grey)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else source.convert(mode)
    if mode == "LA":
        image.putalpha(Image.fromarray(grey.T.copy()))
    assert image.mode == mode
    image.info["icc_profile"] = icc
    picture = read_picture(image)
    levels = np.asarray(image.convert("L")).astype(float) if mode in ("1", "LA") else grey.astype(float)
    linear = (levels[..., None] / 255) ** 1.5
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert np.abs(picture.rgb - srgb).max() <= 2
    assert picture.icc is None
    assert (picture.alpha is not None) == (mode == "LA")


def test_read_picture_with_a_profile_that_is_no_bytes_takes_the_pixels_as_they_are():
    image = Image.new("RGB", (4, 4), "teal")
    image.info["icc_profile"] = "sRGB"
    picture = read_picture(image)
    assert picture.icc is None
    np.testing.assert_array_equal(picture.rgb, np.asarray(image))


def gamma_profile() -> bytes:
    """A grey ICC profile of gamma 1.5, with that curve as its only tag (ICC.1:2010, 7.2 to 7.3 and 10.5)."""
    white = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1, 0.8249)))
    header = struct.pack(">I4sI4s4s4s", 160, b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp"
    tag = struct.pack(">I4sII", 1, b"kTRC", 144, 14)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 0x180) + bytes(2)
    return header + bytes(28) + white + bytes(48) + tag + curve


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "I;16", "CMYK"])
def test_read_picture_of_many_strips_converts_like_one(monkeypatch, mode):
    image = Image.fromarray(smooth()).convert("I" if mode == "I;16" else mode)
    whole = read_picture(image)
    for pixels in (150, 7):  # three rows, of 32, and one, which is longer
        monkeypatch.setattr("lsast_engines.images._STRIP", pixels)
        np.testing.assert_array_equal(read_picture(image).rgb, whole.rgb)


def test_find_pictures_lists_every_kind_that_is_read(tmp_path):
    kinds = {"avif": "AVIF", "jpe": "JPEG", "jp2": "JPEG2000", "mpo": "MPO", "apng": "PNG", "tga": "TGA", "qoi": "QOI"}
    for suffix, kind in kinds.items():
        Image.fromarray(smooth()).save(tmp_path / f"a.{suffix}", kind)
    found = find_pictures(tmp_path)
    assert sorted(path.suffix[1:] for path in found) == sorted(kinds)
    assert {read_picture(path).size for path in found} == {(32, 48)}


def test_find_pictures_follows_links_and_names_what_it_leaves_out(tmp_path, caplog, monkeypatch):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "sub", inside / "closed", outside):
        folder.mkdir(parents=True)
        (folder / "a.png").touch()
    (inside / "album").symlink_to(outside)
    (inside / "again").symlink_to(inside / "sub")
    (inside / "loop").symlink_to(inside)
    (inside / "up").symlink_to(tmp_path)
    (outside / "back").symlink_to(outside)
    (inside / "gone.jpg").symlink_to(tmp_path / "nothing")
    scandir = os.scandir

    def refuse(folder: Path) -> Any:
        if folder == inside / "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_pictures(inside) == [inside / "album/a.png", inside / "sub/a.png"]
    for reason in ("closed is left out: Permission denied", "gone.jpg is left out", "up is left out"):
        assert reason in caplog.text


def test_read_picture_of_heif_names_the_library_it_needs():
    if importlib.util.find_spec("pillow_heif"):
        pytest.skip("pillow-heif is installed")
    with pytest.raises(PictureError, match="pip install pillow-heif"):
        read_picture(b"\0\0\0\x18ftypheic" + bytes(20))


def test_import_opencv_without_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("lsast_engines.images._opencv", [])
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(LsastError, match=r"OpenCV cannot be imported .*; install it with: pip install opencv-python"):
        import_opencv()


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_read_picture_of_several_frames_says_that_it_reads_the_first(form, caplog):
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 128, 255)]
    picture = read_picture(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    assert picture.rgb.max() < 8
    assert caplog.messages == ["the picture has several frames; the first is read"]
    read_picture(encoded(frames[0], form))
    assert len(caplog.messages) == 1
