import io
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lsast import Options, PictureError, Result, UsageError
from lsast_engines.files import replace_file
from lsast_engines.images import find_pictures

OPTIONS = Options(style="monet", steps=1, strength=1.0, guidance=1.0, control_scale=1.0, size=0, solver="ddim")


def _result(channels: int, shape: tuple[int, int] = (40, 60)) -> Result:
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    layers = [rows * 4, columns * 4, 255 - rows * 2, columns * 255 // max(1, shape[1] - 1)][:channels]
    return Result(Image.fromarray(np.stack(layers, axis=-1).clip(0, 255).astype(np.uint8)), {}, OPTIONS)


@pytest.mark.parametrize(
    ("name", "format_name", "tolerance"),
    [("a.png", "PNG", 0), ("a.JPEG", "JPEG", 8), ("a.webp", "WEBP", 12), ("a.avif", "AVIF", 12), ("a.tiff", "TIFF", 0)],
)
def test_save_chooses_the_format_by_suffix(tmp_path, name, format_name, tolerance, caplog):
    """What the format can hold, transparency too, and the same bytes every time."""
    Image.init()
    if format_name not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format_name}")
    path = tmp_path / "new" / "folder" / name
    for result in [_result(3)] if format_name == "JPEG" else [_result(4), _result(3)]:
        result.save(str(path))
        with Image.open(path) as saved:
            assert (saved.format, saved.mode) == (format_name, result.image.mode)
            differences = np.abs(np.asarray(saved).astype(int) - np.asarray(result))
        assert differences[..., 3:].max(initial=0) <= 1
        assert differences.shape[2] == 4 or differences.max() <= tolerance
    buffer = io.BytesIO()
    result.write(buffer, path.suffix)
    assert buffer.getvalue() == path.read_bytes()
    assert not caplog.records


def test_save_where_pillow_has_no_avif_is_refused(tmp_path, monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.SAVE, "AVIF", raising=False)
    with pytest.raises(PictureError, match="this Pillow has no AVIF"):
        _result(3).save(tmp_path / "a.avif")


@pytest.mark.skipif(sys.platform == "win32", reason="its paths are shorter")
def test_save_a_thousand_folders_deep_writes_what_find_pictures_finds(tmp_path):
    path = tmp_path.joinpath("deep", *"d" * 1000, "a.png")
    _result(3).save(path)
    found = find_pictures(tmp_path)
    subprocess.run(["rm", "-rf", str(tmp_path / "deep")], check=True)  # pytest's own removal recurses
    assert found == [path]


def test_result_is_an_array_and_a_picture_of_a_notebook(monkeypatch):
    result = _result(4)
    pixels = np.asarray(result)
    np.testing.assert_array_equal(pixels, np.asarray(result.image))
    assert pixels.flags.writeable
    assert np.asarray(result, np.float32).dtype == np.float32
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(ValueError, match="copy=False"):
            np.array(result, copy=False)
    np.testing.assert_array_equal(Image.open(io.BytesIO(result._repr_png_())), pixels)
    shown: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(image))
    result.show()
    assert shown == [result.image]


def test_save_as_jpeg_composites_on_white_and_warns(tmp_path, caplog):
    result = _result(4)
    with caplog.at_level(logging.WARNING, "lsast"):
        result.save(tmp_path / "a.jpg")
    assert [record.name for record in caplog.records] == ["lsast.result"]
    assert "no transparency" in caplog.text
    white = Image.alpha_composite(Image.new("RGBA", result.image.size, "white"), result.image).convert("RGB")
    difference = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int) - np.asarray(white).astype(int)
    assert np.abs(difference).max() <= 8


@pytest.mark.parametrize("name", ["a.gif", "a", "png", ".png"])
def test_save_with_an_unknown_suffix_lists_the_known(tmp_path, name):
    with pytest.raises(UsageError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        _result(3).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_to_what_is_no_file_raises_and_leaves_it(tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "null.png").symlink_to(os.devnull)
    for name, kind in (("a.png", "folder"), ("null.png", "device")):
        with pytest.raises(UsageError, match=kind):
            _result(3).save(tmp_path / name)
    with pytest.raises(OSError, match="expected a file"), replace_file(tmp_path / "null.png"):
        pass
    assert not os.path.isfile(os.devnull)
    for name in ("a\0.png", "a" * 300 + ".png", "null.png/a.png"):
        with pytest.raises(PictureError, match="cannot write"):
            _result(3).save(tmp_path / name)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_save_that_fails_keeps_the_existing_file(tmp_path, monkeypatch, error):
    (tmp_path / "a.png").write_bytes(b"before")

    def half(image: Image.Image, handle: object, **settings: object) -> None:
        handle.write(b"half a pic")  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(PictureError if isinstance(error, OSError) else KeyboardInterrupt):
        _result(3).save(tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
