"""Large pictures in tiles, each small enough for the graphs, so that nobody sees where one ends.

Picture, edges and noise are those of the whole canvas; a tile is a window onto them. At every step of the loop the
noise predictions of all tiles are blended into one before the solver goes on, as MultiDiffusion has it (Bar-Tal et al.
2023, eq. 5: the least-squares answer to all tiles at once is their weighted mean), so that tiles never drift apart.
Encoder, hint and decoder run on the same tiles. A tile's outermost cells, where a graph sees its padding instead of
the picture, count for nothing; over the middle of an overlap the weight goes from one tile to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lsast_engines.backends.base import ComputeDtype, Engine, Feeds

from . import sampler
from .sampler import Floats

WHOLE_UP_TO = 1.5
"""A canvas of up to this many tiles' pixels is painted whole."""
_OVERLAP = 4
"""Neighbouring tiles share at least one part in so many of their length."""


@dataclass(frozen=True)
class Span:
    """A tile's place along one axis, in latent cells."""

    cells: slice
    weight: Floats
    """Its share [length] of the blend at each cell; the shares of all tiles sum to 1."""

    def pixels(self, factor: int) -> tuple[slice, Floats]:
        """The same in pixels, `factor` of them along a cell: slice and weight [length * factor]."""
        return slice(self.cells.start * factor, self.cells.stop * factor), spread(self.weight, factor)


@dataclass(frozen=True)
class Grid:
    """The tiles of a canvas: every pair of a row and a column."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    factor: int
    """Pixels along a side of a latent cell."""

    @classmethod
    def lay(cls, canvas: tuple[int, int], tile: int, factor: int, multiple: int) -> Grid:
        """Cover a canvas evenly.

        Args:
            canvas: height and width in pixels, multiples of `multiple`.
            tile: about how many pixels a tile is high and wide; rounded up to `multiple`. 0 paints every canvas whole,
                any other number those of up to `WHOLE_UP_TO` tiles.
            factor: pixels along a side of a latent cell.
            multiple: legal heights and widths of a tile are multiples of this many pixels.
        """
        side = -(-tile // multiple) * multiple
        if tile == 0 or canvas[0] * canvas[1] <= WHOLE_UP_TO * side * side:
            side = max(canvas)
        rows, columns = (_spans(length // factor, min(side, length) // factor) for length in canvas)
        return cls(rows, columns, factor)

    @property
    def whole(self) -> bool:
        """Whether there is but one tile."""
        return len(self.rows) == len(self.columns) == 1

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the canvas in latent cells."""
        return self.rows[-1].cells.stop, self.columns[-1].cells.stop

    def __iter__(self) -> Iterator[tuple[Span, Span]]:
        return ((row, column) for row in self.rows for column in self.columns)


def _spans(length: int, tile: int) -> tuple[Span, ...]:
    """Tiles of `tile` cells, evenly over `length`, with trapezes for weights."""
    overlap = tile // _OVERLAP
    count = 1 if length <= tile else -(-(length - overlap) // (tile - overlap))
    starts = [round(start) for start in np.linspace(0, length - tile, count)]
    # Cell by cell, how far the blend has gone from tile i to tile i + 1: 0, then over the ramp, then 1.
    ramp = max(1, overlap // 2)
    centres = [(start + before + tile) / 2 for before, start in pairwise(starts)]
    positions = np.arange(length) + 0.5
    gone = [np.clip((positions - centre) / ramp + 0.5, 0, 1) for centre in centres]
    entered = [np.ones(length), *gone]
    left = [*gone, np.zeros(length)]
    return tuple(
        Span(slice(start, start + tile), (a - b)[start : start + tile].astype(np.float32))
        for start, a, b in zip(starts, entered, left, strict=True)
    )


def spread(weight: Floats, factor: int) -> Floats:
    """A weight by cell, by pixel: linear between the cells' middles, so that no step shows."""
    pixels = (np.arange(len(weight) * factor) + 0.5) / factor - 0.5
    return np.interp(pixels, np.arange(len(weight)), weight).astype(np.float32)


def hint_features(engine: Engine, edges: npt.NDArray[np.uint8], grid: Grid) -> Floats:
    """What `sampler.hint_features` gives, tile by tile: [H, W] of 0 and 1 → [1, C, h, w].

    Its graph is a few convolutions that look 23 pixels far, less than what of a tile counts for nothing: the same
    values as from the whole picture.
    """
    if grid.whole:
        return sampler.hint_features(engine, edges)
    return _blend(grid, lambda at: sampler.hint_features(engine, edges[at]))


def encode(engine: Engine, rgb: npt.NDArray[np.uint8], scale: float, rng: np.random.Generator, grid: Grid) -> Floats:
    """What `sampler.encode` gives, tile by tile, with the noise of the whole canvas: [H, W, 3] → [1, 4, h, w]."""
    if grid.whole:
        return sampler.encode(engine, rgb, scale, rng)

    def both(at: tuple[slice, slice]) -> Floats:
        mean, std = sampler.posterior(engine, rgb[at])
        return np.concatenate([mean, std])

    mean, std = np.split(_blend(grid, both), 2)
    return sampler.drawn(mean, std, scale, rng)


def decode(engine: Engine, latent: Floats, scale: float, grid: Grid) -> npt.NDArray[np.uint8]:
    """What `sampler.decode` gives, a row of tiles in memory at a time: z₀ [1, 4, h, w] → [H, W, 3] of 0 … 255."""
    if grid.whole:
        return sampler.decode(engine, latent, scale)
    height, width = (cells * grid.factor for cells in grid.cells)
    rgb = np.empty((height, width, 3), np.uint8)
    band = np.zeros((0, width, 3), np.float32)  # what earlier rows of tiles gave of the next one's pixels
    for index, row in enumerate(grid.rows):
        rows, row_weight = row.pixels(grid.factor)
        missing = rows.stop - rows.start - len(band)
        band = np.concatenate([band, np.zeros((missing, width, 3), np.float32)])
        for column in grid.columns:
            columns, column_weight = column.pixels(grid.factor)
            tile = sampler.paint(engine, latent[..., row.cells, column.cells], scale)
            band[:, columns] += tile * row_weight[:, None, None] * column_weight[:, None]
        last = index + 1 == len(grid.rows)
        done = len(band) if last else grid.rows[index + 1].cells.start * grid.factor - rows.start
        rgb[rows.start : rows.start + done] = sampler.to_pixels(band[:done])
        band = band[done:]
    return rgb


class TiledDenoiser:
    """The `denoiser` graph on a canvas of any size: every call runs it once a tile and blends. See `Engine`."""

    def __init__(self, engine: Engine, grid: Grid) -> None:
        self.spec = engine.spec
        self.backend = engine.backend
        self.device = engine.device
        self.compute_dtype: ComputeDtype = engine.compute_dtype
        self._engine = engine
        self._grid = grid
        self._hint: sampler.Floats | None = None

    def bind_inputs(self, feeds: Feeds) -> None:
        """See `Engine.bind_inputs`; the `hint` is cut up."""
        self._hint = feeds.get("hint", self._hint)
        self._engine.bind_inputs({name: value for name, value in feeds.items() if name != "hint"})

    def __call__(self, feeds: Feeds) -> dict[str, npt.NDArray[np.float32]]:
        """See `Engine.__call__`; `latent` [B, 4, h, w] is of the whole canvas, and so is `eps` [G, B, 4, h, w]."""
        eps: Floats | None = None
        for row, column in self._grid:
            at = (..., row.cells, column.cells)
            assert self._hint is not None
            self._engine.bind_inputs({"hint": self._hint[at]})
            tile = self._engine({**feeds, "latent": feeds["latent"][at]})["eps"]
            if eps is None:
                eps = np.zeros((*tile.shape[:-2], *self._grid.cells), np.float32)
            eps[at] += tile * row.weight[:, None] * column.weight
        assert eps is not None
        return {"eps": eps}

    def release_memory(self) -> None:
        """See `Engine.release_memory`."""
        self._engine.release_memory()

    def close(self) -> None:
        """Does nothing: the engine belongs to who opened it."""


def denoiser(engine: Engine, grid: Grid) -> Engine:
    """The engine to denoise a canvas with: itself for a single tile."""
    return engine if grid.whole else TiledDenoiser(engine, grid)


def _blend(grid: Grid, run: Callable[[tuple[slice, slice]], Floats]) -> Floats:
    """Blend what `run` gives [N, C, h, w] of each tile's pixels into [N, C, *grid.cells]."""
    whole: Floats | None = None
    for row, column in grid:
        tile = run((row.pixels(grid.factor)[0], column.pixels(grid.factor)[0]))
        if whole is None:
            whole = np.zeros((*tile.shape[:2], *grid.cells), np.float32)
        whole[..., row.cells, column.cells] += tile * row.weight[:, None] * column.weight
    assert whole is not None
    return whole
