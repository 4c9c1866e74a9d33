from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsast import Options, PictureError, Result, UsageError

OPTIONS = Options(style="monet", steps=1, strength=1.0, guidance=1.0, control_scale=1.0, size=0, solver="ddim")


def _result(channels: int, shape: tuple[int, int] = (40, 60)) -> Result:
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    layers = [rows * 4, columns * 4, 255 - rows * 2, columns * 255 // max(1, shape[1] - 1)][:channels]
    return Result(Image.fromarray(np.stack(layers, axis=-1).clip(0, 255).astype(np.uint8)), {}, OPTIONS)


@pytest.mark.parametrize(
    ("name", "format_name", "tolerance"),
    [("a.png", "PNG", 0), ("a.jpg", "JPEG", 8), ("a.JPEG", "JPEG", 8), ("a.webp", "WEBP", 12)],
)
def test_save_chooses_the_format_by_suffix(tmp_path: Path, name: str, format_name: str, tolerance: int) -> None:
    result = _result(3)
    result.save(str(tmp_path / "new" / "folder" / name))
    saved = Image.open(tmp_path / "new" / "folder" / name)
    assert saved.format == format_name
    difference = np.abs(np.asarray(saved.convert("RGB")).astype(int) - np.asarray(result.image).astype(int))
    assert difference.max() <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_save_as_png_or_webp_keeps_transparency(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    result = _result(4)
    result.save(tmp_path / name)
    np.testing.assert_array_equal(Image.open(tmp_path / name).getchannel("A"), result.image.getchannel("A"))
    assert not caplog.records


def test_result_is_an_array_and_a_picture_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_save_as_jpeg_composites_on_white_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = _result(4)
    with caplog.at_level(logging.WARNING, "lsast"):
        result.save(tmp_path / "a.jpg")
    assert [record.name for record in caplog.records] == ["lsast.result"]
    assert "no transparency" in caplog.text
    white = Image.alpha_composite(Image.new("RGBA", result.image.size, "white"), result.image).convert("RGB")
    difference = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int) - np.asarray(white).astype(int)
    assert np.abs(difference).max() <= 8


def test_save_twice_gives_equal_bytes(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp"):
        for name in ("a", "b"):
            _result(3).save(tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["a.gif", "a", "png", ".png"])
def test_save_with_an_unknown_suffix_lists_the_known(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        _result(3).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_to_a_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UsageError, match="folder"):
        _result(3).save(tmp_path / "a.png")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_save_that_fails_keeps_the_existing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (tmp_path / "a.png").write_bytes(b"before")

    def half(image: Image.Image, handle: object, **settings: object) -> None:
        handle.write(b"half a pic")  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(PictureError if isinstance(error, OSError) else KeyboardInterrupt):
        _result(3).save(tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_save_of_a_picture_too_large_for_the_format_raises(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="WEBP"):
        _result(3, (1, 16384)).save(tmp_path / "a.webp")
    assert not list(tmp_path.iterdir())
