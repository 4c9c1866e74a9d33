"""The result of a repainting, and how it is written to a file."""

from __future__ import annotations

import io
import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from lsast_engines.errors import PictureError, UsageError, shown
from lsast_engines.files import replace_file
from lsast_engines.images import on_white

from .images.formats import WRITTEN_PICTURES, check_format
from .images.metadata import Provenance, Record

if TYPE_CHECKING:
    from lsast_engines.backends.choice import Choice

    from .options.options import Options

_log = logging.getLogger("lsast.result")


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
    choice: Choice | None = None
    """The backend and the compute dtype that painted it, and why they were chosen."""

    def show(self) -> None:
        """Open the painting in the system's viewer, as `PIL.Image.Image.show` does."""
        self.image.show()

    def _repr_png_(self) -> bytes:
        """The painting as PNG, for notebooks."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG", icc_profile=self.image.info.get("icc_profile"))
        return buffer.getvalue()

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """The pixels [H, W, 3] in the order RGB, or [H, W, 4] with transparency, uint8 unless `dtype` says otherwise. A
        `ValueError` for `copy` False: the array is always a new one."""
        if copy is False:
            raise ValueError("found copy=False; expected True or None: the array is always a new one")
        return np.array(self.image, dtype=dtype)

    def save(self, path: str | Path, *, seconds: bool = False) -> None:
        """Write PNG, JPEG, WebP, AVIF or TIFF, by the suffix: whole or not at all, replacing an existing file.

        The file holds `provenance` and `options`, so that equal paintings are equal files. JPEG has no transparency: a
        transparent painting is composited on white, with a warning. With `seconds`, these are written, too.

        Raises:
            UsageError: another suffix, or `path` is a folder.
            PictureError: the file cannot be written, or the format cannot hold so large a picture.
        """
        validate_output_path(path, self.image.size)
        path = Path(path)
        try:
            with replace_file(path) as handle:
                self._write(handle, path, seconds)
        except (OSError, ValueError) as error:
            raise PictureError(f"cannot write {path} ({error}); expected a writable folder with room") from error

    def write(self, handle: BinaryIO, suffix: str = ".png") -> None:
        """Write the bytes of a file, as `save` does, to a stream, which need not be seekable.

        Raises:
            UsageError: another suffix.
            PictureError: the format cannot hold so large a picture, or the stream cannot be written.
        """
        path = Path(f"painting{suffix}")
        check_format(path, self.image.size)
        buffer = io.BytesIO()
        try:
            self._write(buffer, path)
            handle.write(buffer.getbuffer())
            handle.flush()
        except (OSError, ValueError, TypeError, AttributeError) as error:  # a stream of text, or none
            raise PictureError(f"cannot write a {suffix[1:]} to the stream ({error})") from error

    def _write(self, handle: BinaryIO, path: Path, seconds: bool = False) -> None:
        form = WRITTEN_PICTURES[path.suffix.lower()]
        name, arguments = form.name, form.save_args
        image = self.image
        if name == "JPEG" and image.mode == "RGBA":
            fault = "JPEG has no transparency; the painting is composited on white (other formats keep it)"
            _log.warning("%s: %s", path, fault)
            pixels = np.asarray(image)
            image = Image.fromarray(on_white(pixels[:, :, :3], pixels[:, :, 3]))
        if self.provenance:
            record = Record(self.provenance, self.options, self.seconds if seconds else {})
            arguments = {**arguments, **record.pillow_save_args(name)}
        image.save(handle, format=name, icc_profile=self.image.info.get("icc_profile"), **arguments)


def validate_output_path(path: str | Path, size: tuple[int, int] | None = None) -> None:
    """`check_format` and `validate_output_place`, before anything is painted."""
    check_format(path, size)
    validate_output_place(Path(path))


def validate_output_place(path: Path) -> None:
    """Check, before anything is painted, that a file of this name can be written, whatever its format; a `UsageError`
    for a folder, a device or a pipe, a `PictureError` where the folder cannot be written, or the name is too long."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise PictureError(f"cannot write {shown(path)} ({error}); expected another name") from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "device or pipe"
        raise UsageError(f"found the {kind} {path} as output; expected the name of a file")
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PictureError(f"cannot write {path}: found {folder}; expected a folder that can be written")
    longest = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if (length := len(os.fsencode(path.name))) > longest:
        raise PictureError(f"cannot write {path}: found a name of {length} bytes; expected at most {longest}")
