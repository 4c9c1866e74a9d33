"""Opening picture files of any format that Pillow reads, bounded before they are decoded.

Pillow's own `Image.open` is not used: it hands PostScript to Ghostscript, whatever a file is called, and warns of
sizes, or refuses them, by a setting of the whole process.
"""

from __future__ import annotations

import contextlib
import io
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import PictureError

if TYPE_CHECKING:
    from PIL import Image, ImageFile

# fmt: off
FORMATS = frozenset({
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "HEIF", "ICNS", "ICO",
    "IM", "IMT", "JPEG", "JPEG2000", "MCIDAS", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI",
    "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB",
})
# fmt: on
"""Pillow's names of the formats that are read; none of them starts another program or opens another file."""

MAX_BYTES = 850_000_000
"""Bytes that a picture may take when it is decoded, Pillow's pixels and ours: 121 megapixels of RGB, 212 of grey.

With what painting takes, that stays below 4 GB of memory."""

_log = logging.getLogger("lsast.images")


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a picture's file, or raise an OSError; a pipe, which cannot be sought, is read first (`read_stream`)."""
    with path.open("rb") as handle:
        yield handle if handle.seekable() else io.BytesIO(read_stream(handle, str(path)))


def read_stream(stream: Any, name: str) -> bytes:
    """All bytes of a binary stream; a `PictureError`, with its `name`, if there are none, or more than `MAX_BYTES`, or
    the stream is one of text."""
    found = io.BytesIO()
    while data := stream.read(1 << 20):
        if isinstance(data, str):
            raise PictureError(f"found a text in {name}; expected one opened as binary")
        if found.write(data) and found.tell() > MAX_BYTES:
            raise PictureError(f"found more than {MAX_BYTES / 1e6:.0f} MB in {name}; expected the file of one picture")
    if not found.tell():
        raise PictureError(f"found nothing in {name}; expected a picture")
    return found.getvalue()


def open_image(handle: BinaryIO, name: str) -> Image.Image:
    """The picture in a file, not yet decoded; as `PIL.Image.open`, but of `FORMATS` only and without its warnings. A
    `PictureError`, with its `name`, if it is of no such format; damaged files may raise anything."""
    from PIL import Image

    start = handle.read(16)
    for initialise in (Image.preinit, Image.init):  # a few common formats, then all
        initialise()
        for kind in Image.ID:
            if kind not in FORMATS:
                continue
            factory, accept = Image.OPEN[kind]
            try:
                accepted = accept is None or accept(start)
                if accepted and not isinstance(accepted, str):  # a text says what the format needs
                    handle.seek(0)
                    return factory(handle, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        try:
            from pillow_heif import HeifImageFile  # type: ignore[import-not-found]  # optional
        except ImportError:
            raise PictureError(f"{name} is a HEIF picture; to read it: pip install pillow-heif") from None
        handle.seek(0)
        opened: Image.Image = HeifImageFile(handle, "")
        return opened
    raise PictureError(f"{name} is not a picture that Pillow can read; expected PNG, JPEG, WebP, TIFF …")


def has_alpha(image: Image.Image) -> bool:
    """Whether the image has opacity, in its mode or beside it."""
    return image.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info


def check_size(image: Image.Image, name: str, max_megapixels: float | None) -> None:
    """Raises a `PictureError` if a picture, not yet decoded, has more than `max_megapixels`, or, if that is None, would
    take more than `MAX_BYTES`."""
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    pixel = stored + 3 + has_alpha(image)
    limit = MAX_BYTES / pixel / 1e6 if max_megapixels is None else max_megapixels
    if (megapixels := image.width * image.height / 1e6) > limit:
        raise PictureError(
            f"{name} has {image.width} x {image.height} pixels, {megapixels:.3g} megapixels of mode {image.mode}; "
            f"expected at most {limit:.3g}: scale it down, or allow more (max_megapixels)"
        )


def name_other_frames(image: ImageFile.ImageFile, name: str) -> None:
    """Log that one of several frames is read."""
    if image.format not in ("MPO", "PSD"):  # previews and depths beside a photo, and layers, are no frames
        with contextlib.suppress(Exception):  # a file that is damaged behind its first frame
            if getattr(image, "is_animated", False):
                _log.warning("%s has several frames; the first is read", name)
