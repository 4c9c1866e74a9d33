from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lsast
from large import borders
from lsast import Stylizer
from lsast.sampling.sampler import Floats
from lsast.sampling.tiling import Grid, TiledDenoiser, decode, encode, hint_features, spread
from lsast_engines.bundle.bundle import EMBEDDED
from lsast_engines.bundle.graph_spec import CONTROLNET_COND, DENOISER, VAE_DECODER, VAE_ENCODER, Geometry, graph_specs

CANVASES = {
    "both axes": ((1024, 1536), 256),
    "one axis": ((128, 4096), 256),
    "hardly": ((320, 320), 256),
    "uneven": ((576, 1216), 320),
    "rounded up": ((1024, 1024), 200),
}


@pytest.fixture(scope="module")
def stylizer(bundle_path: Path) -> Iterator[Stylizer]:
    with lsast.load(bundle_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def mini() -> Iterator[Stylizer]:
    with lsast.load(EMBEDDED, backend="onnxruntime", threads=1) as opened:
        yield opened


def _pixels(result: lsast.Result) -> np.ndarray:
    return np.asarray(result.image).astype(int)


@pytest.mark.parametrize(("canvas", "tile"), CANVASES.values(), ids=CANVASES)
def test_a_grid_covers_the_canvas_with_weights_that_sum_to_one(canvas: tuple[int, int], tile: int) -> None:
    grid = Grid.lay(canvas, tile, 8, 64)
    total = np.zeros((canvas[0] // 8, canvas[1] // 8))
    for row, column in grid:
        area = total[row.cells, column.cells]
        assert area.size, "outside the canvas"
        area += np.outer(row.weight, column.weight)
        for span in (row, column):
            assert (span.cells.stop - span.cells.start) % 8 == 0, "no legal tile"
            assert 0 <= span.weight.min() <= span.weight.max() <= 1
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize(("canvas", "tile"), CANVASES.values(), ids=CANVASES)
def test_weights_by_pixel_sum_to_one_and_a_tiles_rim_counts_for_nothing(canvas: tuple[int, int], tile: int) -> None:
    grid = Grid.lay(canvas, tile, 8, 64)
    for length, axis in zip(canvas, (grid.rows, grid.columns), strict=True):
        total = np.zeros(length)
        for span in axis:
            pixels, weight = span.pixels(8)
            total[pixels] += weight
            if pixels.start > 0:
                assert (weight[:8] == 0).all()
            if pixels.stop < length:
                assert (weight[-8:] == 0).all()
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_small_canvases_and_those_of_tile_0_are_whole() -> None:
    assert Grid.lay((512, 768), 512, 8, 64).whole  # one and a half
    assert not Grid.lay((512, 832), 512, 8, 64).whole
    assert Grid.lay((4096, 4096), 0, 8, 64).whole


def test_a_weight_by_pixel_is_linear_between_cells() -> None:
    np.testing.assert_allclose(spread(np.array([0, 1, 1], np.float32), 4)[2:6], [0.125, 0.375, 0.625, 0.875])


class _Positions:
    """A denoiser whose noise at a cell is where the cell lies in what it is given, plus the hint: depends on tiles."""

    spec = graph_specs(Geometry(hint_channels=1, tokens=1, unet_width=1, control_width=1))[DENOISER]
    backend = device = "fake"
    compute_dtype = "fp32"

    def bind_inputs(self, feeds: Any) -> None:
        self.hint = feeds.get("hint", getattr(self, "hint", None))

    def __call__(self, feeds: Any) -> dict[str, Floats]:
        latent = feeds["latent"]
        rows, columns = np.mgrid[0 : latent.shape[-2], 0 : latent.shape[-1]]
        return {"eps": (latent + 100 * rows + columns + self.hint)[None].astype(np.float32)}


def test_overlapping_noise_is_the_weighted_mean_of_the_tiles() -> None:
    grid = Grid.lay((128, 448), 128, 8, 64)
    engine = TiledDenoiser(_Positions(), grid)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((2, 4, 16, 56), dtype=np.float32)
    hint = rng.standard_normal((2, 1, 16, 56), dtype=np.float32)
    engine.bind_inputs({"hint": hint})
    found = engine({"latent": latent})["eps"]
    # By hand: tiles of 16 cells start at every 10th, so that one hands over to the next at 13, 23, 33 and 43; tiles
    # overlap by a quarter of 16 at least, and half of that, 2 cells, is what the blend goes over.
    assert [span.cells.start for span in grid.columns] == [0, 10, 20, 30, 40]
    places = np.zeros(56)
    for x in range(56):
        tile = sum(x >= handing_over for handing_over in (13, 23, 33, 43))
        places[x] = x - 10 * tile
        if x + 1 in (13, 23, 33, 43):
            places[x] = 0.75 * places[x] + 0.25 * (places[x] - 10)
        if x in (13, 23, 33, 43):
            places[x] = 0.75 * places[x] + 0.25 * (places[x] + 10)
    expected = latent + hint + 100 * np.arange(16)[:, None] + places
    np.testing.assert_allclose(found[0], expected, atol=1e-3)


def test_graphs_that_look_no_further_than_a_cell_paint_in_tiles_what_they_paint_whole(
    stylizer: Stylizer, photo: np.ndarray
) -> None:
    large = np.tile(photo, (4, 3, 1))[:330, :400]
    for solver in ("ddim", "dpmpp2m", "unipc"):
        whole, tiled = (_pixels(stylizer.stylize(large, size=0, tile=tile, solver=solver)) for tile in (0, 128))
        assert np.abs(whole - tiled).max() <= 1, solver
        assert whole.std() > 5, "a flat picture proves nothing"


def test_every_tile_is_asked_and_none_is_larger_than_a_tile(
    stylizer: Stylizer, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[tuple[int, ...]]] = {
        name: set() for name in (VAE_ENCODER, CONTROLNET_COND, DENOISER, VAE_DECODER)
    }
    for name in seen:
        engine = stylizer._workshop.engines[name]
        call = engine.__call__

        def spy(feeds: Any, name: str = name, call: Any = call) -> Any:
            seen[name] |= {value.shape[-2:] for key, value in feeds.items() if key != "timestep"}
            return call(feeds)

        monkeypatch.setitem(stylizer._workshop.engines, name, _Spied(engine, spy))
    stylizer.stylize(np.tile(photo, (3, 3, 1)), size=0, tile=128)
    assert seen == {
        VAE_ENCODER: {(128, 128)},
        CONTROLNET_COND: {(128, 128)},
        DENOISER: {(16, 16)},
        VAE_DECODER: {(16, 16)},
    }


class _Spied:
    def __init__(self, engine: Any, call: Any) -> None:
        self._engine, self._call = engine, call

    def __call__(self, feeds: Any) -> Any:
        return self._call(feeds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_the_embedded_autoencoder_and_hint_give_in_tiles_what_they_give_whole(mini: Stylizer) -> None:
    """Convolutions without normalisation: what of a tile counts saw its surroundings as the whole picture has them."""
    rng = np.random.default_rng(3)
    rgb = np.kron(rng.integers(0, 255, (24, 40, 3)), np.ones((16, 16, 1))).astype(np.uint8)  # 384 x 640
    whole, grid = (Grid.lay((384, 640), tile, 8, 64) for tile in (0, 320))
    assert len(grid.columns) > 1 < len(grid.rows)
    engines = mini._workshop.engines
    edges = (rgb[..., 0] > 127).astype(np.uint8)
    np.testing.assert_allclose(
        hint_features(engines[CONTROLNET_COND], edges, grid),
        hint_features(engines[CONTROLNET_COND], edges, whole),
        atol=1e-4,
    )
    latents = [encode(engines[VAE_ENCODER], rgb, 1.0, np.random.default_rng(0), g) for g in (whole, grid)]
    # The encoder looks 84 pixels far, beyond the 20 to 40 that count for nothing, though with little weight.
    assert np.abs(latents[0] - latents[1]).max() < 0.02 * latents[0].std()
    pictures = [decode(engines[VAE_DECODER], latents[0], 1.0, g).astype(int) for g in (whole, grid)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 3


def _clouds(side: int) -> np.ndarray:
    """1/f noise [side, side, 3]: as much going on everywhere, at every scale."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    spectra = np.fft.rfft2(np.random.default_rng(2).standard_normal((3, side, side))) / frequency
    waves = np.fft.irfft2(spectra, (side, side)).transpose(1, 2, 0)
    return np.clip(128 + 40 * waves / waves.std(), 0, 255).astype(np.uint8)


def _across(painting: np.ndarray, lines: tuple[list[int], list[int]], reach: int = 2) -> float:
    """Squared differences of pixels across lines, and up to `reach` beside them, as a share of those elsewhere."""
    shares = []
    for axis in (0, 1):
        steps = (np.diff(painting.astype(float), axis=axis) ** 2).mean(axis=(1 - axis, 2))
        near = np.zeros(len(steps), bool)
        for line in lines[axis]:
            near[line - reach : line + reach - 1] = True
        shares.append(steps[near].mean() / steps[~near].mean())
    return float(np.mean(shares))


@pytest.mark.slow
def test_no_seam_is_seen_between_tiles_of_the_embedded_bundle(mini: Stylizer) -> None:
    side, tile = 640, 320
    lines = borders(Grid.lay((side, side), tile, 8, 64))
    options = {"size": 0, "steps": 4, "strength": 0.75, "guidance": 2.0}
    whole, tiled = (_pixels(mini.stylize(_clouds(side), tile=t, **options)) for t in (0, tile))
    assert _across(tiled, lines) / _across(whole, lines) == pytest.approx(1, abs=0.05)
    # Tiles side by side, each painted alone, do show: the measure is one.
    quarters = [
        np.hstack([_pixels(mini.stylize(_clouds(side)[y : y + tile, x : x + tile], **options)) for x in (0, tile)])
        for y in (0, tile)
    ]
    assert _across(np.vstack(quarters), ([tile], [tile])) > 2
