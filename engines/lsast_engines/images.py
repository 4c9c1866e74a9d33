"""Image files as 8-bit RGB arrays, and their edges: the same for training and for sampling.

Every mode that Pillow opens is converted: greyscale, palette, CMYK and Lab through their ICC profile, 16-bit by its
full range.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import PictureError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".jfif", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""File suffixes (lower case) of the files that `find_pictures` returns."""


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


def find_pictures(folder: Path) -> list[Path]:
    """All image files under `folder`, at any depth, sorted; hidden files and folders are skipped.

    Raises:
        PictureError: the folder does not exist or has no image.
    """
    if not folder.is_dir():
        raise PictureError(f"found no folder {folder}; expected a folder of pictures")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise PictureError(f"found no picture under {folder}; expected files ending in {', '.join(sorted(SUFFIXES))}")
    return paths


def read_picture(source: str | Path | bytes | Image.Image | npt.NDArray[Any]) -> Image8:
    """Decode an image to upright 8-bit RGB.

    Args:
        source: a path, the bytes of an image file, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] or
            [H, W, 4]: uint8, uint16 (full range) or float in [0, 1].

    Raises:
        PictureError: not found, not a picture, truncated, or an array of another shape or range.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    from PIL import Image, UnidentifiedImageError

    name = str(source) if isinstance(source, (str, Path)) else "the picture"
    try:
        if isinstance(source, (str, Path)):
            source = Path(source).read_bytes()
        with warnings.catch_warnings():
            # Pillow warns about odd EXIF and about images over 89 megapixels; both can be read.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
            image.load()
            return _from_image(_upright(image))
    except FileNotFoundError:
        raise PictureError(f"found no file {name}; expected a picture") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not a picture that Pillow can read; expected PNG, JPEG, WebP, TIFF …") from None
    except PictureError:
        raise
    # Pillow's decoders raise many types for damaged files: struct.error, EOFError, KeyError …
    except Exception as error:
        raise PictureError(f"{name} cannot be decoded ({error}); expected a whole picture file") from error


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF, e.g. struct.error; the pixels can be read, the orientation is unknown
        return image


def _from_array(array: npt.NDArray[Any]) -> Image8:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise PictureError(f"found an array of shape {array.shape}; expected [H, W, 3] (or [H, W], [H, W, 1 or 4])")
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) + 128) // 257
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise PictureError("found a float array with values outside [0, 1]; expected [0, 1] or uint8")
        array = np.round(array * 255)
    elif array.dtype != np.uint8:
        raise PictureError(f"found an array of {array.dtype}; expected uint8, uint16 or float in [0, 1]")
    pixels: npt.NDArray[np.uint8] = np.ascontiguousarray(array.astype(np.uint8))
    if pixels.shape[2] == 1:
        return Image8(np.repeat(pixels, 3, axis=2))
    return Image8(np.ascontiguousarray(pixels[:, :, :3]), pixels[:, :, 3] if pixels.shape[2] == 4 else None)


def _from_image(image: Image.Image) -> Image8:
    icc: bytes | None = image.info.get("icc_profile") or None
    alpha: npt.NDArray[np.uint8] | None = None
    if image.mode == "La":
        image = image.convert("LA")  # the only mode to which Pillow converts premultiplied grey
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"), dtype=np.uint8)
        if (alpha == 255).all():
            alpha = None
    if image.mode.startswith(("I;16", "I", "F")):
        return Image8(np.repeat(_wide_grey(image)[:, :, None], 3, axis=2), alpha)
    if image.mode in ("CMYK", "LAB") and icc is not None:
        converted = _to_srgb(image, icc)
        return Image8(np.array(converted, dtype=np.uint8), alpha)
    # A grey profile does not describe RGB pixels; an RGB profile does, also for a palette of RGB colours.
    keep = icc if image.mode in ("RGB", "RGBA", "RGBX", "P", "PA") else None
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return Image8(np.array(image.convert("RGB"), dtype=np.uint8), alpha, keep)


def _wide_grey(image: Image.Image) -> npt.NDArray[np.uint8]:
    """16- and 32-bit grey to 8 bits: 16-bit by its full range, others by the range of their values."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise PictureError("found a picture with NaN or infinite values; expected finite ones")
    if image.mode.startswith("I;16") or (low >= 0 and 255 < high <= 65535):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if image.mode == "F" and high <= 1 else 255.0
    scaled: npt.NDArray[np.uint8] = np.round((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    return scaled


def _to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        converted = None  # a damaged profile: convert without it
    return image.convert("RGB") if converted is None else converted


def canny_edges(rgb: npt.NDArray[np.uint8], low: float = 100.0, high: float = 200.0) -> npt.NDArray[np.uint8]:
    """Canny edges of an 8-bit RGB image: [H, W, 3] → [H, W] of 0 and 1; thresholds of docs/method.md §4, step 2."""
    import cv2

    edges: npt.NDArray[np.uint8] = (cv2.Canny(np.ascontiguousarray(rgb), low, high) > 0).astype(np.uint8)
    return edges


def on_white(rgb: npt.NDArray[np.uint8], alpha: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
    """An image [H, W, 3] with opacity [H, W] composited on white; None is opaque."""
    if alpha is None:
        return rgb
    cover = alpha[:, :, None] / 255
    return np.round(rgb * cover + 255 * (1 - cover)).astype(np.uint8)


def read_on_white(path: Path) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] of an image file, composited on white.

    Raises:
        PictureError: see `read_picture`.
    """
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
