"""Pillow's images of every mode as 8-bit RGB: grey, CMYK and Lab through their ICC profile, 16 bits by their range."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import PictureError

if TYPE_CHECKING:
    from PIL import Image

BOX = 1 << 20
"""Pixels that are converted at once."""


def has_alpha(image: Image.Image) -> bool:
    """Whether the image has opacity, in its mode or beside it."""
    return image.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info


def boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, right and bottom of boxes of at most `BOX` pixels that cover a size (width, height)."""
    width, height = size
    columns = min(width, BOX)
    rows = max(1, BOX // columns)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)


def is_wide(image: Image.Image) -> bool:
    """Whether its values are grey, of more than 8 bits."""
    return image.mode.startswith(("I;16", "I", "F"))


def converter(image: Image.Image, icc: bytes | None) -> Callable[[Image.Image], npt.NDArray[np.uint8]]:
    """A function that converts parts of `image` to RGB [h, w, 3], or to grey [h, w, 1] where that is the same."""
    from PIL import Image

    if is_wide(image):
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
    parts = [np.asarray(image.crop(box)) for box in boxes(image.size)]
    low, high = float(min(part.min() for part in parts)), float(max(part.max() for part in parts))
    if not all(np.isfinite(part).all() for part in parts):
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
