"""The file suffixes of the pictures and videos that are read and written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsast_engines.errors import PictureError, UsageError


@dataclass(frozen=True)
class PictureFormat:
    """A format of pictures that is written."""

    name: str
    """Pillow's."""
    save_args: dict[str, Any] = field(hash=False)
    """Arguments of Pillow's `save`."""
    max_side: float = math.inf
    """The largest width and height in pixels."""


_JPEG = PictureFormat("JPEG", {"quality": 95, "subsampling": "4:4:4"}, 65500)

WRITTEN_PICTURES = {
    ".png": PictureFormat("PNG", {"compress_level": 4}),  # much quicker than the default of 6, and hardly larger
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": PictureFormat("WEBP", {"quality": 95}, 16383),
}
"""Pictures that can be written, by suffix; a source of another kind becomes a PNG."""

VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})
"""Suffixes of videos."""

WRITTEN_VIDEOS = frozenset({".m4v", ".mkv", ".mov", ".mp4"})
"""Suffixes of videos that can be written; a source of another kind becomes an MP4."""


def check_format(path: Path, size: tuple[int, int] | None = None) -> None:
    """Check that the format of `path` is written and holds a picture of `size`, width and height; None is not known.

    Raises:
        UsageError: the suffix names no format that is written.
        PictureError: the size is too large.
    """
    form = WRITTEN_PICTURES.get(path.suffix.lower())
    if form is None:
        raise UsageError(f"found the output {path}; expected a name that ends in {', '.join(WRITTEN_PICTURES)}")
    if size is not None and max(size) > form.max_side:
        raise PictureError(
            f"cannot write {path}: found {size[0]} x {size[1]} pixels; expected at most {form.max_side} a side in "
            f"{form.name}: take .png, or scale the picture down"
        )
