"""The result of a repainting, and how it is written to a file."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lsast_engines.errors import PictureError, UsageError
from lsast_engines.files import replace_file
from lsast_engines.images import on_white

if TYPE_CHECKING:
    from PIL import Image

    from .images.provenance import Provenance
    from .options.options import Options

_log = logging.getLogger("lsast.result")

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {"compress_level": 4}),  # much quicker than the default of 6, and hardly larger
    ".jpg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".webp": ("WEBP", {"quality": 95}),
}
"""Pillow's name of the format and arguments of `save`, by suffix."""


@dataclass(frozen=True)
class Result:
    """A repainted picture."""

    image: Image.Image
    """RGB, or RGBA if the picture's transparency was kept; upright, in the picture's colour profile, and, except with
    `fit` "stretch", of its size."""
    seconds: dict[str, float]
    """Wall time of each phase, in their order: read, edges, encode, denoise, decode, finish."""
    options: Options
    """All options, with the defaults filled in."""
    provenance: Provenance | None = None
    """What the painting was made of; files hold it, so that the painting can be repeated (`lsast.images.metadata`)."""

    def save(self, path: str | Path) -> None:
        """Write PNG, JPEG or WebP, by the suffix: whole or not at all, replacing an existing file.

        JPEG has no transparency: a transparent painting is composited on white, with a warning.

        Raises:
            UsageError: another suffix, or `path` is a folder.
            PictureError: the file cannot be written, or the format cannot hold so large a picture.
        """
        path = Path(path)
        validate_output_path(path)
        try:
            with replace_file(path) as handle:
                self._write(handle, path)
        except (OSError, ValueError) as error:
            name, _ = _FORMATS[path.suffix.lower()]
            raise PictureError(
                f"cannot write {path} ({error}); expected a writable folder and a size {name} holds"
            ) from error

    def write(self, handle: BinaryIO, suffix: str = ".png") -> None:
        """Write the bytes of a PNG, JPEG or WebP file to a stream, which need not be seekable.

        Raises:
            UsageError: another suffix.
            PictureError: the format cannot hold so large a picture, or the stream cannot be written.
        """
        path = Path("painting" + suffix)
        validate_output_path(path)
        buffer = io.BytesIO()
        try:
            self._write(buffer, path)
            handle.write(buffer.getbuffer())
            handle.flush()
        except (OSError, ValueError) as error:
            raise PictureError(f"cannot write a {suffix[1:]} to the stream ({error})") from error

    def _write(self, handle: BinaryIO, path: Path) -> None:
        from PIL import Image

        name, arguments = _FORMATS[path.suffix.lower()]
        image = self.image
        if name == "JPEG" and image.mode == "RGBA":
            _log.warning(
                "%s: JPEG has no transparency; the painting is composited on white (PNG and WebP keep it)", path
            )
            pixels = np.asarray(image)
            image = Image.fromarray(on_white(pixels[:, :, :3], pixels[:, :, 3]))
        if self.provenance:
            from .images.metadata import Record

            record = Record(self.provenance, self.options, self.seconds)
            arguments = {**arguments, **record.pillow_save_args(name)}
        image.save(handle, format=name, icc_profile=self.image.info.get("icc_profile"), **arguments)


def validate_output_path(path: Path) -> None:
    """Check, before anything is painted, that `path` can name an output.

    Raises:
        UsageError: the suffix names no format that is written, or `path` is a folder.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"found the output {path}; expected a name that ends in {', '.join(_FORMATS)}")
    if path.is_dir():
        raise UsageError(f"found the folder {path} as output; expected the name of a file")
