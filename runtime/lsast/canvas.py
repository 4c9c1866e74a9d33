"""Where a picture lies on the canvas that the graphs paint: scaled without squashing, padded, and cut out again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Canvas:
    """A picture of `own` size, painted at `inner` size in the middle of a canvas of `outer` size."""

    own: tuple[int, int]
    """Height and width of the picture, in pixels."""
    inner: tuple[int, int]
    """Height and width it is painted at; the same aspect to within half a pixel."""
    outer: tuple[int, int]
    """Height and width of the canvas: `inner` rounded up to legal multiples."""

    @classmethod
    def fit(cls, own: tuple[int, int], size: int, multiple: int) -> Canvas:
        """The canvas for a picture.

        Args:
            own: height and width of the picture, in pixels.
            size: paint at about size * size pixels; 0 paints at the picture's own size.
            multiple: legal heights and widths are multiples of this many pixels.

        Very long pictures are scaled further down, so that the canvas stays near size * size pixels although its
        short side cannot be less than `multiple`.
        """
        scale = 1.0
        if size:
            scale = min(size / math.sqrt(own[0] * own[1]), size * size / multiple / max(own))
        inner = (max(1, round(own[0] * scale)), max(1, round(own[1] * scale)))
        outer = (-(-inner[0] // multiple) * multiple, -(-inner[1] // multiple) * multiple)
        return cls(own, inner, outer)

    def place(self, rgb: Pixels) -> Pixels:
        """Scale a picture [*own, 3] and mirror it over its borders: [*outer, 3].

        Mirrored rather than flat borders, so that the edges and textures that the denoiser sees run on.
        """
        spare = [(outer - inner) for outer, inner in zip(self.outer, self.inner, strict=True)]
        margins = [(pixels // 2, pixels - pixels // 2) for pixels in spare]
        return np.pad(_resize(rgb, self.inner), [*margins, (0, 0)], mode="symmetric")

    def cut(self, painted: Pixels) -> Pixels:
        """Cut the picture out of a painted canvas [*outer, 3] and give it its own size back: [*own, 3]."""
        (height, width), (outer_height, outer_width) = self.inner, self.outer
        top, left = (outer_height - height) // 2, (outer_width - width) // 2
        return _resize(painted[top : top + height, left : left + width], self.own)


def on_white(rgb: Pixels, alpha: Pixels | None) -> Pixels:
    """Lay a picture [H, W, 3] of opacity [H, W] on white; None is opaque."""
    if alpha is None:
        return rgb
    cover = alpha[:, :, None] / 255
    return np.round(rgb * cover + 255 * (1 - cover)).astype(np.uint8)


def _resize(rgb: Pixels, size: tuple[int, int]) -> Pixels:
    """Lanczos, by Pillow: OpenCV's does not widen its kernel when it shrinks, which aliases."""
    if rgb.shape[:2] == size:
        return rgb
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(rgb)).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image, dtype=np.uint8)
