"""Large pictures in tiles, each small enough for the graphs, without visible seams.

Picture, edges and noise are those of the whole canvas; a tile is a window onto them. At every step the predicted noise
of all tiles is blended into one before the solver goes on (MultiDiffusion, Bar-Tal et al. 2023, eq. 5: the
least-squares solution for all tiles at once is their weighted mean), so that tiles never drift apart. The other
networks run on the same tiles. The outermost cells of a tile, where a graph sees its padding instead of the picture,
have weight 0; over the middle of an overlap the weight passes from one tile to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lsast_engines.backends.base import Feeds

from .networks import Denoiser, Floats, Pixels, to_pixels

WHOLE_UP_TO = 1.5
"""A canvas of up to this many tiles' pixels is painted whole."""
_OVERLAP = 4
"""Neighbouring tiles share at least one part in so many of their length."""


@dataclass(frozen=True)
class TileSpan:
    """A tile's place along one axis, in latent cells."""

    cells: slice
    weight: Floats
    """Its weight [length] in the blend at each cell; the weights of all tiles sum to 1."""

    def pixels(self, factor: int) -> tuple[slice, Floats]:
        """The same in pixels, `factor` of them along a cell: slice and weight [length * factor], which is linear
        between the middles of cells, so that no step shows."""
        places = (np.arange(len(self.weight) * factor) + 0.5) / factor - 0.5
        weight = np.interp(places, np.arange(len(self.weight)), self.weight).astype(np.float32)
        return slice(self.cells.start * factor, self.cells.stop * factor), weight


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a canvas: every pair of a row and a column."""

    rows: tuple[TileSpan, ...]
    columns: tuple[TileSpan, ...]
    factor: int
    """Pixels along a side of a latent cell."""

    @classmethod
    def cover(cls, canvas: tuple[int, int], side: int, factor: int) -> TileGrid:
        """Cover a canvas evenly with tiles of `side` pixels; both are multiples of what the graphs take, and `factor`
        is the number of pixels along a side of a latent cell."""
        rows, columns = (_spans(length // factor, min(side, length) // factor) for length in canvas)
        return cls(rows, columns, factor)

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the canvas in latent cells."""
        return self.rows[-1].cells.stop, self.columns[-1].cells.stop

    def __iter__(self) -> Iterator[tuple[TileSpan, TileSpan]]:
        return ((row, column) for row in self.rows for column in self.columns)

    def blend(self, tiles: Iterable[Floats]) -> Floats:
        """The weighted mean of every tile's values [..., h, w], in the order of the grid: [..., *cells]."""
        whole: Floats | None = None
        for (row, column), tile in zip(self, tiles, strict=True):
            if whole is None:
                whole = np.zeros((*tile.shape[:-2], *self.cells), np.float32)
            whole[..., row.cells, column.cells] += tile * row.weight[:, None] * column.weight
        assert whole is not None
        return whole


def _spans(length: int, tile: int) -> tuple[TileSpan, ...]:
    """Tiles of `tile` cells, evenly over `length`, with trapezes for weights."""
    overlap = tile // _OVERLAP
    count = 1 if length <= tile else -(-(length - overlap) // (tile - overlap))
    starts = [round(start) for start in np.linspace(0, length - tile, count)]
    # Cell by cell, how far the blend has passed from tile i to tile i + 1: 0, then over the ramp, then 1.
    ramp = max(1, overlap // 2)
    centres = [(start + before + tile) / 2 for before, start in pairwise(starts)]
    positions = np.arange(length) + 0.5
    passed = [np.clip((positions - centre) / ramp + 0.5, 0, 1) for centre in centres]
    entered, left = [np.ones(length), *passed], [*passed, np.zeros(length)]
    return tuple(
        TileSpan(slice(start, start + tile), (a - b)[start : start + tile].astype(np.float32))
        for start, a, b in zip(starts, entered, left, strict=True)
    )


class TiledDenoiser:
    """A denoiser for canvases of any size: every call runs one denoiser a tile and blends their noise."""

    def __init__(self, make_denoiser: Callable[[], Denoiser], grid: TileGrid) -> None:
        """`make_denoiser` gives the denoiser of a tile: one for all if it keeps nothing between steps."""
        self._denoisers = [make_denoiser() for _ in grid]
        self._grid = grid

    def __call__(self, feeds: Feeds) -> Floats:
        """See `Denoiser.__call__`; arrays are of the whole canvas."""
        windows = ((..., row.cells, column.cells) for row, column in self._grid)
        return self._grid.blend(
            denoiser({**feeds, **{name: feeds[name][window] for name in ("latent", "hint")}})
            for denoiser, window in zip(self._denoisers, windows, strict=True)
        )

    def release_memory(self) -> None:
        """See `Denoiser.release_memory`."""
        for denoiser in self._denoisers:
            denoiser.release_memory()


def tiled_encoder(encoder: Callable[[Pixels], Floats], grid: TileGrid) -> Callable[[Pixels], Floats]:
    """A `Networks.vae_encoder` or `Networks.controlnet_cond` for canvases of any size: it runs on each tile, and the
    results are blended. From tiles of 320 pixels on, `controlnet_cond` gives the same as for the whole picture: its
    convolutions look 23 pixels far, and the rim of weight 0 is at least 24 pixels wide."""
    windows = [(slice(None), row.pixels(grid.factor)[0], column.pixels(grid.factor)[0]) for row, column in grid]
    return lambda pixels: grid.blend(encoder(pixels[window]) for window in windows)


def tiled_decoder(decode_rgb: Callable[[Floats], Iterable[Floats]], grid: TileGrid) -> Callable[[Floats], Pixels]:
    """A `Networks.vae_decoder` around `networks.decode_rgb`; it holds one row of tiles in memory as RGB values."""

    def decode(latent: Floats) -> Pixels:
        """One picture: [4, h, w] → [H, W, 3]."""
        height, width = (cells * grid.factor for cells in grid.cells)
        rgb = np.empty((height, width, 3), np.uint8)
        band = np.zeros((0, width, 3), np.float32)  # what earlier rows of tiles gave of the next one's pixels
        for row, next_row in zip(grid.rows, [*grid.rows[1:], None], strict=True):
            rows, row_weight = row.pixels(grid.factor)
            missing = rows.stop - rows.start - len(band)
            band = np.concatenate([band, np.zeros((missing, width, 3), np.float32)])
            for column in grid.columns:
                columns, column_weight = column.pixels(grid.factor)
                [tile] = decode_rgb(latent[None, :, row.cells, column.cells])
                band[:, columns] += tile * row_weight[:, None, None] * column_weight[:, None]
            done = next_row.cells.start * grid.factor - rows.start if next_row else len(band)
            rgb[rows.start : rows.start + done] = to_pixels(band[:done])
            band = band[done:]
        return rgb

    return lambda latents: np.stack([decode(latent) for latent in latents])
