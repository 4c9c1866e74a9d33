"""Where a picture lies on the canvas that the graphs paint: scaled and padded, or stretched, and cropped again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lsast_engines.images import import_opencv

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Canvas:
    """A picture of size `own`, painted at size `inner` in the middle of a canvas of size `outer`."""

    own: tuple[int, int]
    """Height and width of the picture and of its painting, in pixels."""
    inner: tuple[int, int]
    """Height and width that it is painted at; the same aspect to within half a pixel."""
    outer: tuple[int, int]
    """Height and width of the canvas: `inner` rounded up to legal multiples."""

    @classmethod
    def fit(cls, own: tuple[int, int], size: int, multiple: int) -> Canvas:
        """The canvas for a picture of `own` height and width; legal sides are multiples of `multiple` pixels.

        It has about size * size pixels, with `size` 0 those of the picture. Very long pictures are scaled further down,
        because a side cannot be less than `multiple`.
        """
        scale = 1.0
        if size:
            scale = min(size / math.sqrt(own[0] * own[1]), size * size / multiple / max(own))
        inner = (max(1, round(own[0] * scale)), max(1, round(own[1] * scale)))
        return cls(own, inner, (_round_up(inner[0], multiple), _round_up(inner[1], multiple)))

    def pad(self, rgb: Pixels) -> Pixels:
        """Scale a picture [*own, 3] to `inner` and mirror it over its borders, [*outer, 3], so that edges and textures
        go on."""
        spare = [(outer - inner) for outer, inner in zip(self.outer, self.inner, strict=True)]
        margins = [(pixels // 2, pixels - pixels // 2) for pixels in spare]
        return np.pad(resize(rgb, self.inner), [*margins, (0, 0)], mode="symmetric")

    def valid_cells(self, cells: tuple[int, ...]) -> tuple[slice, slice]:
        """Rows and columns of the picture, with partly filled ones, on the canvas scaled down to `cells`."""
        spans = []
        for inner, outer, count in zip(self.inner, self.outer, cells, strict=True):
            first, size = (outer - inner) // 2, outer // count
            spans.append(slice(first // size, -(-(first + inner) // size)))
        return spans[0], spans[1]

    def crop(self, painted: Pixels) -> Pixels:
        """The output: the picture cut out of a painted canvas [*outer, 3] and scaled to its own size, [*own, 3]."""
        (height, width), (outer_height, outer_width) = self.inner, self.outer
        top, left = (outer_height - height) // 2, (outer_width - width) // 2
        return resize(painted[top : top + height, left : left + width], self.own)


def canvas_for(own: tuple[int, int], size: int, multiple: int, fit: Literal["aspect", "stretch"]) -> Canvas:
    """The canvas for a picture of `own` height and width; see `Options.size` and `Options.fit`. With "stretch" it is a
    square, to which the picture is resized first, as the released code does (docs/method.md §4, steps 1 and 2)."""
    if fit == "aspect":
        return Canvas.fit(own, size, multiple)
    square = (_round_up(size, multiple),) * 2
    return Canvas(square, square, square)


def released_edge_input(rgb: Pixels, size: tuple[int, int]) -> Pixels:
    """In what the released code finds edges: [H, W, 3] by OpenCV's bilinear, not as for the encoder, and in BGR as of
    cv2.imread: where two channels are equally steep, Canny takes the first."""
    return np.asarray(import_opencv().resize(np.ascontiguousarray(rgb[..., ::-1]), size[::-1]), dtype=np.uint8)


def resize(plane: Pixels, size: tuple[int, int]) -> Pixels:
    """[H, W] or [H, W, 3] by Pillow's Lanczos: OpenCV's does not widen its kernel for smaller sizes, which aliases."""
    if plane.shape[:2] == size:
        return plane
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(plane)).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image, dtype=np.uint8)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
