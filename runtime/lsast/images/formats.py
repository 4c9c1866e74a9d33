"""The file suffixes of the pictures and videos that are read and written."""

import contextlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsast_engines.errors import PictureError, UsageError


@dataclass(frozen=True)
class PictureFormat:
    """A format of pictures that is written: Pillow's name, arguments of its `save`, most pixels of a side."""

    name: str
    save_args: dict[str, Any] = field(hash=False)
    max_side: float = math.inf


_JPEG = PictureFormat("JPEG", {"quality": 95, "subsampling": "4:4:4"}, 65500)
_TIFF = PictureFormat("TIFF", {})  # uncompressed: libtiff writes no EXIF

WRITTEN_PICTURES = {
    ".png": PictureFormat("PNG", {"compress_level": 4}),  # much quicker than the default of 6, and hardly larger
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": PictureFormat("WEBP", {"quality": 95}, 16383),
    ".avif": PictureFormat("AVIF", {"quality": 90, "subsampling": "4:4:4", "max_threads": 1}, 65536),
    ".tif": _TIFF,
    ".tiff": _TIFF,
}
"""Pictures that can be written, by suffix; a source of another kind becomes a PNG."""

# fmt: off
VIDEOS = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf",
    ".ogv", ".ts", ".vob", ".webm", ".wmv",
})
# fmt: on

WRITTEN_VIDEOS = {".m4v": "mp4", ".mkv": "matroska", ".mov": "mov", ".mp4": "mp4"}
"""FFmpeg's names of the videos that are written, by suffix; a source of another kind becomes a Matroska file, which
holds any sound."""

ANIMATIONS = {".apng": "apng", ".gif": "gif", ".png": "apng", ".webp": "webp"}
"""FFmpeg's names of the animated pictures that are read and written as videos are, by suffix; a PNG only where it is
animated."""


def video_format(source: Path, out: Path) -> str | None:
    """FFmpeg's name of the format of `out`, by its suffix, if that holds the frames of `source`; .png only those of an
    animated PNG."""
    suffix = out.suffix.lower()
    if suffix == ".png" and source.suffix.lower() not in (".png", ".apng"):
        return None
    return (WRITTEN_VIDEOS | ANIMATIONS).get(suffix)


def read_header(path: Path) -> tuple[tuple[int, int], bool] | None:
    """Width and height of a picture, which is not decoded, and whether it has several frames; None if not known."""
    from lsast_engines.picture_file import open_image

    # What is wrong with a picture is told when it is read. A pipe can be read only once.
    with contextlib.suppress(Exception):
        if path.is_file():
            with path.open("rb") as handle:
                image = open_image(handle, str(path))
                return image.size, bool(getattr(image, "is_animated", False))
    return None


def is_animated(path: Path) -> bool:
    """Whether a file is a picture with several frames, of a kind of `ANIMATIONS`; False if it cannot be read."""
    return path.suffix.lower() in ANIMATIONS and (read_header(path) or ((), False))[1]


def check_format(path: str | Path, size: tuple[int, int] | None = None) -> None:
    """Check that the format of `path` is written and holds a picture of `size`, width and height; None is not known.
    Raises a `UsageError` for another suffix, or what is no name; a `PictureError` where the picture is too large or
    Pillow was built without the format."""
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"found {type(path).__name__} as path; expected the name of a file")
    path = Path(path)
    form = WRITTEN_PICTURES.get(path.suffix.lower())
    if form is None:
        raise UsageError(f"found the output {path}; expected a name that ends in {', '.join(WRITTEN_PICTURES)}")
    if form.name == "AVIF":
        from PIL import Image

        Image.init()
        if form.name not in Image.SAVE:
            raise PictureError(f"cannot write {path}: this Pillow has no AVIF; take .png, or: pip install -U pillow")
    if size is not None and max(size) > form.max_side:
        raise PictureError(
            f"cannot write {path}: found {size[0]} x {size[1]} pixels; expected at most {form.max_side} a side in "
            f"{form.name}: take .png, or scale the picture down"
        )
