"""Previews of a painting that is not finished: latents to colours without the decoder."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lsast_engines.images import import_opencv

if TYPE_CHECKING:
    from PIL import Image

    from .canvas import Canvas, Pixels

Floats = npt.NDArray[np.float32]


class Previewer:
    """Makes small pictures of a picture's latents, one pixel for each latent cell. Colours are an affine map of the
    latent's channels, fitted by least squares, when the first preview is asked for, to the picture's own latent and
    the picture scaled down to its size: no constants of the base are needed."""

    def __init__(self, content: Pixels, z0: Floats, canvas: Canvas) -> None:
        """Of the canvas as it was encoded, [H, W, 3], its latent z0 [4, h, w], and where the picture lies on it."""
        self._content = content
        self._z0 = z0
        self._canvas = canvas

    def __call__(self, latent: Floats) -> Image.Image:
        """The preview of a latent [4, h, w]: about w x h pixels, without the margin of the canvas."""
        from PIL import Image

        colours = np.clip(_with_one(latent) @ self._map, 0, 255).reshape(*latent.shape[1:], 3)
        rows, columns = self._canvas.valid_cells(latent.shape[1:])
        return Image.fromarray(np.round(colours[rows, columns]).astype(np.uint8))

    @functools.cached_property
    def _map(self) -> npt.NDArray[np.float64]:
        """[5, 3]: what each channel and the constant add to red, green and blue."""
        cv2 = import_opencv()
        height, width = self._z0.shape[1:]
        small = cv2.resize(self._content, (width, height), interpolation=cv2.INTER_AREA)
        target = np.asarray(small, np.float64).reshape(-1, 3)
        found, *_ = np.linalg.lstsq(_with_one(self._z0), target, rcond=None)
        return np.asarray(found, np.float64)


def _with_one(latent: Floats) -> npt.NDArray[np.float64]:
    """[C, h, w] → [h * w, C + 1], the last column 1."""
    channels = latent.reshape(len(latent), -1).T.astype(np.float64)
    return np.column_stack([channels, np.ones(len(channels))])
