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
    """Height and width of the picture, in pixels."""
    inner: tuple[int, int]
    """Height and width that it is painted at; the same aspect to within half a pixel."""
    outer: tuple[int, int]
    """Height and width of the canvas: `inner` rounded up to legal multiples."""

    @classmethod
    def fit(cls, own: tuple[int, int], size: int, multiple: int) -> Canvas:
        """The canvas for a picture.

        Very long pictures are scaled further down, so that the canvas stays near size * size pixels although its
        short side cannot be less than `multiple`.

        Args:
            own: height and width of the picture, in pixels.
            size: paint at about size * size pixels; 0 paints at the picture's own size.
            multiple: legal heights and widths are multiples of this many pixels.
        """
        scale = 1.0
        if size:
            scale = min(size / math.sqrt(own[0] * own[1]), size * size / multiple / max(own))
        inner = (max(1, round(own[0] * scale)), max(1, round(own[1] * scale)))
        return cls(own, inner, (_round_up(inner[0], multiple), _round_up(inner[1], multiple)))

    def pad(self, rgb: Pixels) -> Pixels:
        """Scale a picture [*own, 3] to `inner` and mirror it over its borders: [*outer, 3].

        Mirrored rather than flat borders, so that the edges and textures that the denoiser sees continue.
        """
        spare = [(outer - inner) for outer, inner in zip(self.outer, self.inner, strict=True)]
        margins = [(pixels // 2, pixels - pixels // 2) for pixels in spare]
        return np.pad(_resize(rgb, self.inner), [*margins, (0, 0)], mode="symmetric")

    def encoder_and_edge_inputs(self, rgb: Pixels) -> tuple[Pixels, Pixels]:
        """The input of the encoder and that of the edge detector, [*outer, 3] each: the same."""
        padded = self.pad(rgb)
        return padded, padded

    def to_output(self, plane: Pixels) -> Pixels:
        """The picture, its opacity or its mask in the size of the output: itself."""
        return plane

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output: the picture's."""
        return self.own

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
        return _resize(painted[top : top + height, left : left + width], self.own)


@dataclass(frozen=True)
class StretchCanvas:
    """A picture stretched to a square, whatever its aspect; the output is the painted square.

    So does the released code (docs/method.md §4, steps 1 and 2), which resamples the picture in one way for the encoder
    and in another for the edges.
    """

    side: int
    """Height and width of the canvas, in pixels."""

    @classmethod
    def fit(cls, size: int, multiple: int) -> StretchCanvas:
        """The canvas of size * size pixels, `size` rounded up to a multiple of `multiple`."""
        return cls(_round_up(size, multiple))

    def encoder_and_edge_inputs(self, rgb: Pixels) -> tuple[Pixels, Pixels]:
        """The input of the encoder, RGB by Lanczos, and that of the edge detector, BGR: [side, side, 3] each.

        The second is resampled by OpenCV's bilinear. Its channels are in the order of cv2.imread, as in the released
        code: where two channels are equally steep, Canny takes the first.
        """
        cv2 = import_opencv()
        bgr = cv2.resize(np.ascontiguousarray(rgb[..., ::-1]), (self.side, self.side))
        return self.to_output(rgb), np.asarray(bgr, dtype=np.uint8)

    def to_output(self, plane: Pixels) -> Pixels:
        """The picture, its opacity or its mask in the size of the output: stretched, [side, side, …]."""
        return _resize(plane, (self.side, self.side))

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output: the canvas's."""
        return self.side, self.side

    def valid_cells(self, cells: tuple[int, ...]) -> tuple[slice, slice]:
        """Rows and columns of the picture on the canvas scaled down to `cells`: all."""
        return slice(0, cells[0]), slice(0, cells[1])

    def crop(self, painted: Pixels) -> Pixels:
        """The output: the painted canvas, [side, side, 3]."""
        return painted


def canvas_for(
    own: tuple[int, int], size: int, multiple: int, fit: Literal["aspect", "stretch"]
) -> Canvas | StretchCanvas:
    """The canvas for a picture of `own` height and width; see `Options.size` and `Options.fit`."""
    return StretchCanvas.fit(size, multiple) if fit == "stretch" else Canvas.fit(own, size, multiple)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _resize(rgb: Pixels, size: tuple[int, int]) -> Pixels:
    """[H, W] or [H, W, 3] by Pillow's Lanczos: OpenCV's does not widen its kernel for smaller sizes, which aliases."""
    if rgb.shape[:2] == size:
        return rgb
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(rgb)).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image, dtype=np.uint8)
