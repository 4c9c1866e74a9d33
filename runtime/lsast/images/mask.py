"""Where a picture is painted, and which of its colours it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lsast_engines.errors import PictureError
from lsast_engines.images import read_picture

from .canvas import Pixels

if TYPE_CHECKING:
    from PIL import Image


def read_mask(
    source: str | Path | bytes | Image.Image | npt.NDArray[Any], size: tuple[int, int], feather: int
) -> Pixels:
    """How much is painted of every pixel, 0 (nothing) to 255 (all): [H, W].

    Args:
        source: the mask as any kind of picture: white is painted, black is not, grey in part (its luma, ITU-R BT.601);
            what is transparent is not painted.
        size: height and width of the picture that it is for.
        feather: pixels over which the painting fades in from the border of the unpainted; 0 leaves the mask as it is.

    Raises:
        PictureError: the mask cannot be read, or is not of the picture's size.
    """
    import cv2

    mask = read_picture(source)
    if mask.size != size:
        (height, width), (rows, columns) = size, mask.size
        raise PictureError(
            f"found a mask of {columns} x {rows} pixels; expected {width} x {height}, the size of the picture: scale it"
        )
    share = mask.rgb.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    if mask.alpha is not None:
        share *= mask.alpha.astype(np.float32) / 255
    if feather and (share < 0.5).any():
        # Distance to the nearest pixel that is not painted at all, so that what fades lies inside and none outside.
        inside = cv2.distanceTransform((share >= 0.5).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        share *= np.minimum(np.asarray(inside, np.float32) / (feather + 1), 1)
    return np.round(share).astype(np.uint8)


def to_latent_mask(mask: Pixels, factor: int) -> npt.NDArray[np.float32]:
    """The mean of a mask over every latent cell: [H, W] of 0 … 255 → [H / factor, W / factor] of 0 … 1."""
    height, width = mask.shape
    blocks = mask.reshape(height // factor, factor, width // factor, factor).astype(np.float32)
    means: npt.NDArray[np.float32] = blocks.mean(axis=(1, 3)) / np.float32(255)
    return means


def composite(painted: Pixels, picture: Pixels, mask: Pixels) -> Pixels:
    """The painting where the mask is 255, the picture to the bit where it is 0: [H, W, 3]."""
    share = mask[:, :, None].astype(np.float32) / 255
    return np.round(picture + share * (painted.astype(np.float32) - picture)).astype(np.uint8)


def keep_colour(painted: Pixels, picture: Pixels) -> Pixels:
    """The painting's luma with the picture's chroma: [H, W, 3].

    In the Y'CbCr of ITU-R BT.601 an RGB value is its luma plus what the chroma gives, so that the difference of lumas
    is added to all three channels; what leaves 0 … 255 is cut off.
    """
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    lift = painted.astype(np.float32) @ luma - picture.astype(np.float32) @ luma
    return np.round(np.clip(picture + lift[:, :, None], 0, 255)).astype(np.uint8)
