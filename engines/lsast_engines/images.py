"""Pictures of every mode as 8-bit RGB arrays, and their edges: the same for training and for sampling.

Grey, CMYK and Lab are converted through their ICC profile, 16 bits by their range; `picture_file` opens the files.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import LsastError, PictureError, enough_memory, shown
from .picture_file import FORMATS, check_size, has_alpha, name_other_frames, open_file, open_image, read_stream

if TYPE_CHECKING:
    from PIL import Image

Source = Any
"""A path, the bytes of an image file, a file object, a PIL image, or an array."""

_STRIP = 1 << 20  # pixels that are converted at once, or a row

_LIBRARY_PATH = "LD_LIBRARY_PATH"
_importing = threading.Lock()
_opencv: list[Any] = []

_log = logging.getLogger("lsast.images")


@dataclass(frozen=True)
class Image8:
    """A decoded image, upright and in 8-bit RGB."""

    rgb: npt.NDArray[np.uint8]
    """Pixels [H, W, 3]."""
    alpha: npt.NDArray[np.uint8] | None = None
    """Opacity [H, W], or None if the source has none."""
    icc: bytes | None = None
    """The RGB colour profile of the pixels, or None for sRGB."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.rgb.shape[0], self.rgb.shape[1]


def require_folder(folder: Path) -> None:
    """Raise a `PictureError` if there is no such folder."""
    if not folder.is_dir():
        found = "the file" if folder.exists() else "no folder"
        raise PictureError(f"found {found} {folder}; expected a folder of pictures")


def find_pictures(folder: Path, others: list[Path] | None = None) -> list[Path]:
    """All image files under `folder`, at any depth, sorted; hidden files and folders are skipped.

    A linked folder is searched too, unless it lies inside `folder` or around it. Folders that cannot be read, and links
    to nothing, are logged. `others` gets the files whose suffix is that of no picture.

    Raises:
        PictureError: the folder does not exist or has no image.
    """
    require_folder(folder)
    paths = sorted(_search(folder, [] if others is None else others))
    if not paths:
        raise PictureError(f"found no picture under {folder}; expected files like .jpg, .png, .tif or .webp")
    return paths


@functools.cache
def _suffixes() -> frozenset[str]:
    from PIL import Image

    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    return frozenset({*known, ".heic", ".heif", ".hif"})


def _search(root: Path, others: list[Path]) -> Iterator[Path]:
    resolved, linked, folders = root.resolve(), set[Path](), [root]
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            _log.warning("the folder %s is left out: %s", shown(folder), error.strerror)
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    if entry.is_symlink():
                        target = path.resolve()
                        if target in linked or target == resolved or resolved in target.parents:
                            continue
                        if target in resolved.parents:
                            _log.warning("%s is left out: it is a link to a folder around %s", shown(path), shown(root))
                            continue
                        linked.add(target)
                    folders.append(path)
                elif path.suffix.lower() not in _suffixes():
                    others.append(path)
                elif entry.is_file():
                    yield path
                elif entry.is_symlink():
                    _log.warning("%s is left out: it is a link to a file that is not there", shown(path))
                else:
                    _log.warning("%s is left out: it is no file", shown(path))
            except OSError as error:  # a link into a folder that is closed to us, or around in a circle
                _log.warning("%s is left out: %s", shown(path), error.strerror)


def read_picture(source: Source, max_megapixels: float | None = None) -> Image8:
    """Decode an image to upright 8-bit RGB.

    Args:
        source: a path, the bytes of an image file, a binary file object, a PIL image, or an array (anything that NumPy
            takes, e.g. a tensor) [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] in the order RGB: bool, uint8, uint16 (full
            range) or float in [0, 1]. An `Image8` is returned as it is.
        max_megapixels: most pixels of a file, in millions, checked before it is decoded; None bounds its memory by
            `MAX_BYTES`.

    Raises:
        PictureError: not found, not a picture, truncated, too large, or an array of another shape or range.
    """
    from PIL import Image, ImageFile

    if isinstance(source, Image8):
        return source
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        if not hasattr(source, "read"):
            return _from_array(source)
        source = _read(source)
    name = shown(source) if isinstance(source, (str, os.PathLike)) else "the picture"
    try:
        with enough_memory(f"to read {name}", "scale it down, or close other programs"), ExitStack() as stack:
            if isinstance(source, Image.Image):
                image = source
                if isinstance(image, ImageFile.ImageFile) and image.format not in {None, *FORMATS}:
                    raise PictureError(f"found a picture of format {image.format}; load it first, or convert it to PNG")
            elif isinstance(source, (str, os.PathLike)):
                image = open_image(stack.enter_context(open_file(Path(os.fsdecode(source)))), name)
            else:
                image = open_image(io.BytesIO(bytes(source)), name)
            if isinstance(image, ImageFile.ImageFile):
                check_size(image, name, max_megapixels)
                if image is not source:  # else the caller chose the frame
                    name_other_frames(image, name)
            if 0 in image.size:
                raise PictureError(f"{name} has {image.width} x {image.height} pixels; expected at least one")
            image.load()
            return _from_image(image)
    except FileNotFoundError:
        raise PictureError(f"found no file {name}; expected a picture") from None
    except IsADirectoryError:
        raise PictureError(f"found the folder {name}; expected a picture") from None
    except LsastError:
        raise
    # Pillow's decoders raise many types for damaged files: struct.error, EOFError, KeyError …
    except Exception as error:
        raise PictureError(f"{name} cannot be decoded ({error}); expected a whole picture file") from error


def _read(file: Any) -> bytes:
    try:
        return read_stream(file, "the file object")
    except (OSError, ValueError, TypeError) as error:  # ValueError: a closed file, or texts that are not UTF-8
        raise PictureError(f"the file object cannot be read ({error}); expected an open one, of bytes") from error


def _from_array(source: object) -> Image8:
    if not hasattr(source, "__array__") and not hasattr(source, "__array_interface__"):
        raise PictureError(f"found {type(source).__name__}; expected a path, bytes, a file, a PIL image or an array")
    try:
        array: npt.NDArray[Any] = np.asarray(source)  # no matrix, which has two axes whatever is done to it
    except Exception as error:  # e.g. torch's TypeError for a tensor on a GPU
        raise PictureError(f"found {type(source).__name__} that is no array for NumPy ({error})") from error
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise PictureError(f"found an array of shape {array.shape}; expected [H, W, 3] (or [H, W], [H, W, 1 or 4])")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.type is np.uint16:  # in either order of bytes
        array = (array.astype(np.uint32) + 128) // 257
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise PictureError("found a float array with values outside [0, 1]; expected [0, 1] or uint8")
        array = np.round(array * 255)
    elif array.dtype != np.uint8:
        raise PictureError(f"found an array of {array.dtype}; expected bool, uint8, uint16 or float in [0, 1]")
    pixels: npt.NDArray[np.uint8] = np.ascontiguousarray(array.astype(np.uint8))
    if pixels.shape[2] == 1:
        return Image8(np.repeat(pixels, 3, axis=2))
    return Image8(np.ascontiguousarray(pixels[:, :, :3]), pixels[:, :, 3] if pixels.shape[2] == 4 else None)


def _from_image(image: Image.Image) -> Image8:
    """A loaded image, converted strip by strip, so that there is no second copy of it in another mode."""
    found = image.info.get("icc_profile")  # of an image in memory it may be anything
    icc = found if isinstance(found, bytes) and found else None
    if image.mode == "La":
        image = image.convert("LA")  # the only mode to which Pillow converts premultiplied grey
    orientation = _orientation(image)
    shape = (image.height, image.width) if orientation < 5 else (image.width, image.height)
    rgb = np.empty((*shape, 3), np.uint8)
    alpha = np.empty(shape, np.uint8) if has_alpha(image) else None
    stored_rgb = _stored(rgb, orientation)
    stored_alpha = None if alpha is None else _stored(alpha, orientation)
    convert = _converter(image, icc)
    for rows in _strips(image.height, image.width):
        part = image.crop((0, rows.start, image.width, rows.stop))
        if stored_alpha is not None:
            rgba = part.convert("RGBA")
            stored_alpha[rows] = np.asarray(rgba.getchannel("A"))
            part = rgba if "transparency" in image.info and not _is_wide(image) else part
        stored_rgb[rows] = convert(part)
    if alpha is not None and alpha.min() == 255:
        alpha = None
    # A grey profile does not describe RGB pixels; an RGB profile does, also for a palette of RGB colours.
    keep = icc if image.mode in ("RGB", "RGBA", "RGBX", "P", "PA") else None
    return Image8(rgb, alpha, keep)


def _strips(height: int, width: int) -> Iterator[slice]:
    """The rows of strips of at most `_STRIP` pixels, or of one row, from the top."""
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def _is_wide(image: Image.Image) -> bool:
    """Whether its values are grey, of more than 8 bits."""
    return image.mode.startswith(("I;16", "I", "F"))


def _converter(image: Image.Image, icc: bytes | None) -> Callable[[Image.Image], npt.NDArray[np.uint8]]:
    """A function that converts parts of `image` to RGB [h, w, 3], or to grey [h, w, 1] where that is the same."""
    from PIL import Image

    if _is_wide(image):
        low, high = _grey_range(image)
        to_srgb = _srgb_transform(icc, "L", "GRAY")

        def convert_wide(part: Image.Image) -> npt.NDArray[np.uint8]:
            values = np.asarray(part).astype(np.float64)
            grey = np.round((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
            return grey[:, :, None] if to_srgb is None else np.asarray(to_srgb(Image.fromarray(grey)))

        return convert_wide
    mode, space = {"CMYK": ("CMYK", "CMYK"), "LAB": ("LAB", "Lab")}.get(image.mode, ("L", "GRAY"))
    if image.mode in ("CMYK", "LAB", "1", "L", "LA") and (transform := _srgb_transform(icc, mode, space)) is not None:
        return lambda part: np.asarray(transform(part.convert(mode)))
    return lambda part: np.asarray(part.convert("RGB"))


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """The values that become 0 and 255: of 16 bits the full range, of others the range of their values."""
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low + high):  # NaN passes through both
        raise PictureError("found a picture with NaN or infinite values; expected finite ones")
    if low >= 0 and 255 < high <= 65535:
        return 0.0, 65535.0
    if low >= 0 and high <= 255:
        return 0.0, 1.0 if image.mode == "F" and high <= 1 else 255.0
    return low, high


def _srgb_transform(icc: bytes | None, mode: str, space: str) -> Callable[[Image.Image], Image.Image] | None:
    """The conversion of images of `mode` from the profile `icc` to sRGB; None without one of this colour space."""
    if icc is None:
        return None
    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if profile.profile.xcolor_space.strip() != space:
            return None
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None  # a damaged profile: convert without it
    return lambda part: transform.apply(part)


def _orientation(image: Image.Image) -> int:
    """How the image was stored, 1 to 8, from its EXIF; 1 where it does not say."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF, e.g. struct.error; the pixels can be read
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _stored(upright: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """A view of `upright` in the order in which an image of this EXIF orientation is stored."""
    turned = upright.swapaxes(0, 1) if orientation >= 5 else upright
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    return turned[::rows, ::columns]


def import_opencv() -> Any:
    """OpenCV's module `cv2`, imported nowhere else; a `LsastError` if it cannot be imported.

    The import puts a folder of OpenCV and the current one at the front of ``LD_LIBRARY_PATH``, where programs that the
    process starts would look for their libraries; here it leaves the environment as it was.
    """
    if _opencv:  # without the lock, which another thread may hold in the moment of a fork
        return _opencv[0]
    with _importing:
        before = os.environ.get(_LIBRARY_PATH)
        try:
            with enough_memory("to load OpenCV"):
                _opencv.append(importlib.import_module("cv2"))
        except ImportError as error:
            mend = "install it with: pip install opencv-python-headless"
            raise LsastError(f"OpenCV cannot be imported ({error}); {mend}") from error
        finally:
            if before is None:
                os.environ.pop(_LIBRARY_PATH, None)
            else:
                os.environ[_LIBRARY_PATH] = before
    return _opencv[0]


def canny_edges(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Canny edges of an 8-bit RGB image: [H, W, 3] → [H, W] of 0 and 1; thresholds of docs/method.md §4, step 2."""
    cv2 = import_opencv()
    edges: npt.NDArray[np.uint8] = (cv2.Canny(np.ascontiguousarray(rgb), 100, 200) > 0).astype(np.uint8)
    return edges


def on_white(rgb: npt.NDArray[np.uint8], alpha: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
    """An image [H, W, 3] with opacity [H, W] composited on white; None is opaque."""
    if alpha is None:
        return rgb
    result = np.empty_like(rgb)
    for rows in _strips(*alpha.shape):
        cover = alpha[rows, :, None] / 255
        result[rows] = np.round(rgb[rows] * cover + 255 * (1 - cover))
    return result


def read_on_white(path: Path) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] of an image file, composited on white; raises as `read_picture`."""
    picture = read_picture(path)
    return on_white(picture.rgb, picture.alpha)


def psnr(found: npt.NDArray[Any], expected: npt.NDArray[Any], peak: float = 255) -> float:
    """PSNR, 10 log10(peak² / mean squared error), in dB; infinite for equal arrays."""
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def pixels_sha256(*planes: npt.NDArray[np.uint8] | None) -> str:
    """SHA-256 (hex) over shapes and values of arrays; None adds nothing."""
    digest = hashlib.sha256()
    for plane in planes:
        if plane is not None:
            digest.update(f"{plane.shape}".encode())
            digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()
