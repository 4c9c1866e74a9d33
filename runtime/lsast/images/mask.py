"""Masks, which say where a picture is painted; and painting in the picture's own colours."""

import numpy as np
import numpy.typing as npt

from lsast_engines.errors import PictureError
from lsast_engines.images import Source, import_opencv, read_picture

from ..sessions.native_calls import native_call
from .canvas import Pixels

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Luma of an RGB value, ITU-R BT.601."""


def read_mask(source: Source, size: tuple[int, int], feather: int, max_megapixels: float | None = None) -> Pixels:
    """The weight of the painting at every pixel, 0 to 255: [H, W] of `size`, the picture's. White is painted, black is
    not, grey is painted in part, by its luma; transparent pixels are not. Over `feather` pixels the painting fades
    in from the edge of the mask. Raises a `PictureError` where the mask cannot be read, or is of another size."""
    try:
        mask = read_picture(source, max_megapixels)
    except PictureError as error:
        raise PictureError(f"mask: {error}") from error
    if mask.size != size:
        (height, width), (rows, columns) = size, mask.size
        raise PictureError(
            f"found a mask of {columns} x {rows} pixels; expected {width} x {height}, the size of the picture: scale it"
        )
    weight = mask.rgb.astype(np.float32) @ _LUMA
    if mask.alpha is not None:
        weight *= mask.alpha.astype(np.float32) / 255
    if feather and (weight < 0.5).any():
        cv2 = import_opencv()
        # Distance to the nearest pixel that is not painted at all: the fade lies inside the mask.
        with native_call():
            distance = cv2.distanceTransform((weight >= 0.5).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        weight *= np.minimum(np.asarray(distance, np.float32) / (feather + 1), 1)
    return np.round(weight).astype(np.uint8)


def to_latent_mask(mask: Pixels, factor: int) -> npt.NDArray[np.float32]:
    """The mean of a mask over every latent cell: [H, W] of 0 … 255 → [H / factor, W / factor] of 0 … 1."""
    height, width = mask.shape
    blocks = mask.reshape(height // factor, factor, width // factor, factor).astype(np.float32)
    means: npt.NDArray[np.float32] = blocks.mean(axis=(1, 3)) / np.float32(255)
    return means


def composite(painted: Pixels, picture: Pixels, mask: Pixels) -> Pixels:
    """The painting where the mask is 255, exactly the picture where it is 0: [H, W, 3]."""
    weight = mask[:, :, None].astype(np.float32) / 255
    return np.round(picture + weight * (painted.astype(np.float32) - picture)).astype(np.uint8)


def keep_colour(painted: Pixels, picture: Pixels) -> Pixels:
    """The painting's luma with the picture's chroma, clipped to 0 … 255: [H, W, 3]. In Y'CbCr an RGB value is its luma
    plus a term of its chroma, so that the difference of the lumas is added to all three channels."""
    shift = painted.astype(np.float32) @ _LUMA - picture.astype(np.float32) @ _LUMA
    return np.round(np.clip(picture + shift[:, :, None], 0, 255)).astype(np.uint8)
