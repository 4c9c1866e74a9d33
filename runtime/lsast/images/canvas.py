"""The canvas that the graphs paint: where a picture lies on it, and small previews of it without the decoder."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from lsast_engines.images import import_opencv

Floats = npt.NDArray[np.float32]
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
    def fit(
        cls, own: tuple[int, int], size: int, multiple: int, fit: Literal["aspect", "stretch"] = "aspect"
    ) -> Canvas:
        """The canvas for a picture of `own` height and width; legal sides are multiples of `multiple` pixels.

        See `Options.size` and `Options.fit`. Very long pictures are scaled further down, because a side cannot be less
        than `multiple`. With "stretch" the picture is first resized to the canvas, a square, as the released code does
        (docs/method.md §4, steps 1 and 2).
        """
        if fit == "stretch":
            square = (_round_up(size, multiple),) * 2
            return cls(square, square, square)
        scale = 1.0
        if size:
            scale = min(size / math.sqrt(own[0] * own[1]), size * size / multiple / max(own))
        inner = (max(1, round(own[0] * scale)), max(1, round(own[1] * scale)))
        return cls(own, inner, (_round_up(inner[0], multiple), _round_up(inner[1], multiple)))

    def pad(self, plane: Pixels) -> Pixels:
        """Scale a picture [*own, 3] or a mask [*own] to `inner` and mirror it over its borders, [*outer, …], so that
        edges and textures go on."""
        spare = [(outer - inner) for outer, inner in zip(self.outer, self.inner, strict=True)]
        margins = [(pixels // 2, pixels - pixels // 2) for pixels in spare]
        return np.pad(resize(plane, self.inner), [*margins, (0, 0)][: plane.ndim], mode="symmetric")

    def valid_cells(self, cells: tuple[int, ...]) -> tuple[slice, ...]:
        """Rows and columns of the picture, with partly filled ones, on the canvas scaled down to `cells`."""
        spans = []
        for inner, outer, count in zip(self.inner, self.outer, cells, strict=True):
            first, size = (outer - inner) // 2, outer // count
            spans.append(slice(first // size, -(-(first + inner) // size)))
        return tuple(spans)

    def crop(self, painted: Pixels) -> Pixels:
        """The output: the picture cut out of a painted canvas [*outer, 3] and scaled to its own size, [*own, 3]."""
        return resize(painted[self.valid_cells(self.outer)], self.own)


def released_edge_input(rgb: Pixels, size: tuple[int, int]) -> Pixels:
    """The picture in which the released code finds edges, [H, W, 3]: resized by OpenCV, bilinearly, not as the
    encoder's input; and in BGR, as cv2.imread gives it, because Canny takes the first of two channels that are equally
    steep."""
    return np.asarray(import_opencv().resize(np.ascontiguousarray(rgb[..., ::-1]), size[::-1]), dtype=np.uint8)


def resize(plane: Pixels, size: tuple[int, int]) -> Pixels:
    """[H, W] or [H, W, 3] by Pillow's Lanczos: OpenCV's does not widen its kernel for smaller sizes, which aliases."""
    if plane.shape[:2] == size:
        return plane
    image = Image.fromarray(np.ascontiguousarray(plane)).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image, dtype=np.uint8)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


class Previewer:
    """Makes small pictures of a picture's latents, one pixel for each latent cell. Colours are an affine map of the
    latent's channels, fitted by least squares, when the first preview is asked for, to the picture's own latent and
    the picture scaled down to its size: no constants of the base are needed."""

    def __init__(self, content: Pixels, z0: Floats, canvas: Canvas) -> None:
        """Of the canvas as it was encoded, [H, W, 3], its latent z0 [4, h, w], and where the picture lies on it."""
        self._content, self._z0, self._canvas = content, z0, canvas

    def __call__(self, latent: Floats) -> Image.Image:
        """The preview of a latent [4, h, w]: about w x h pixels, without the margin of the canvas."""
        colours = np.clip(_with_one(latent) @ self._map, 0, 255).reshape(*latent.shape[1:], 3)
        valid = colours[self._canvas.valid_cells(latent.shape[1:])]
        return Image.fromarray(np.round(valid).astype(np.uint8))

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
