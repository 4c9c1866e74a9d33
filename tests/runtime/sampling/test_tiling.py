from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import lsast
from lsast import Stylizer
from lsast.request import Request
from lsast.sampling.networks import CheckedEngine, decode, decode_rgb, embed_edges, encode
from lsast.sampling.tiling import TileGrid, TileSpan, tiled_decoder, tiled_encoder
from lsast_engines.bundle.bundle import EMBEDDED
from lsast_engines.bundle.graph_spec import CONTROLNET_COND, DENOISER, VAE_DECODER, VAE_ENCODER

CANVASES = {
    "both axes": ((1024, 1536), 256),
    "one axis": ((128, 4096), 256),
    "hardly": ((320, 320), 256),
    "uneven": ((576, 1216), 320),
    "square": ((1024, 1024), 256),
}


@pytest.fixture(scope="module")
def mini() -> Iterator[Stylizer]:
    with lsast.load(EMBEDDED, backend="onnxruntime", threads=1) as opened:
        yield opened


def _pixels(result: lsast.Result) -> np.ndarray:
    return np.asarray(result.image).astype(int)


@pytest.mark.parametrize(("canvas", "tile"), CANVASES.values(), ids=CANVASES)
def test_tile_grid_covers_the_canvas_with_weights_that_sum_to_one_and_rims_of_0(canvas, tile):
    grid = TileGrid.cover(canvas, tile, 8)
    total = np.zeros((canvas[0] // 8, canvas[1] // 8))
    for row, column in grid:
        total[row.cells, column.cells] += np.outer(row.weight, column.weight)
    np.testing.assert_allclose(total, 1, atol=1e-6)
    for length, axis in zip(canvas, (grid.rows, grid.columns), strict=True):
        total = np.zeros(length)
        for span in axis:
            assert (span.cells.stop - span.cells.start) % 8 == 0, "no legal tile"
            pixels, weight = span.pixels(8)
            assert 0 <= weight.min() <= weight.max() <= 1
            total[pixels] += weight
            if pixels.start > 0:
                assert (weight[:8] == 0).all()
            if pixels.stop < length:
                assert (weight[-8:] == 0).all()
        np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize(
    ("canvas", "tile", "tiles"),
    [
        ((128, 192), 128, None),  # one and a half
        ((128, 256), 128, 128),
        ((128, 320), 100, 128),  # rounded up to what the graphs take
        ((1024, 1024), 0, None),
    ],
)
def test_request_grid_covers_canvases_of_more_than_one_and_a_half_tiles(stylizer, canvas, tile, tiles):
    options = stylizer.stylize(np.zeros((64, 64, 3), np.uint8), steps=1, tile=tile, size=0).options
    grid = Request(stylizer.bundle, np.zeros((*canvas, 3), np.uint8), options, {}).grid
    assert (grid and 8 * len(grid.columns[0].weight)) == tiles


def test_tile_span_in_pixels_has_weights_that_are_linear_between_cells():
    pixels, weight = TileSpan(slice(5, 8), np.array([0, 1, 1], np.float32)).pixels(4)
    assert pixels == slice(20, 32)
    np.testing.assert_allclose(weight[2:6], [0.125, 0.375, 0.625, 0.875])


def test_tile_grid_blend_goes_over_two_cells_in_the_middle_of_an_overlap():
    # Tiles of 16 cells overlap by a quarter at least, and half of that, 2 cells, is what the blend goes over.
    grid = TileGrid.cover((128, 448), 128, 8)
    assert [span.cells.start for span in grid.columns] == [0, 10, 20, 30, 40]
    between = [number + share for number in range(4) for share in (*[0] * 8, 0.25, 0.75)]
    found = grid.blend(np.full((16, 16), number, np.float32) for number in range(5))
    np.testing.assert_allclose(found, np.tile([*[0] * 4, *between, *[4] * 12], (16, 1)), atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"solver": "dpmpp2m"}, {"solver": "unipc"}, {"cache_interval": 3}, {"decoder": "small"}], ids=str
)
def test_stylize_in_tiles_with_graphs_of_short_reach_paints_what_it_paints_whole(split_stylizer, photo, options):
    """The tiny graphs look no further than two cells; with a cache, each tile has its own."""
    large = np.tile(photo, (4, 3, 1))[:330, :400]
    whole, tiled = (_pixels(split_stylizer.stylize(large, size=0, tile=tile, **options)) for tile in (0, 128))
    assert np.abs(whole - tiled).max() <= 1
    assert whole.std() > 5, "a flat picture proves nothing"


def test_stylize_in_tiles_runs_every_graph_on_tiles_alone(stylizer, photo, monkeypatch):
    seen: dict[str, set[tuple[int, ...]]] = {}
    for name in (VAE_ENCODER, CONTROLNET_COND, DENOISER, VAE_DECODER):
        engine = stylizer._pool.engines[name]

        def run(feeds: Any, name: str = name, run: Any = engine._run) -> Any:
            seen.setdefault(name, set()).update(value.shape[-2:] for key, value in feeds.items() if key != "timestep")
            return run(feeds)

        monkeypatch.setattr(engine, "_run", run)
    stylizer.stylize(np.tile(photo, (3, 3, 1)), size=0, tile=128)
    pixels, cells = {(128, 128)}, {(16, 16)}
    assert seen == {VAE_ENCODER: pixels, CONTROLNET_COND: pixels, DENOISER: cells, VAE_DECODER: cells}


def test_tiled_networks_of_the_embedded_bundle_give_what_they_give_whole(mini):
    """Convolutions without normalisation: what of a tile counts saw its surroundings as the whole picture has them."""
    rng = np.random.default_rng(3)
    rgb = np.kron(rng.integers(0, 255, (24, 32, 3)), np.ones((16, 16, 1))).astype(np.uint8)  # 384 x 512
    grid = TileGrid.cover((384, 512), 320, 8)
    assert len(grid.columns) > 1 < len(grid.rows)
    graphs = {name: CheckedEngine(engine) for name, engine in mini._pool.engines.items()}
    edges = (rgb[None, ..., 0] > 127).astype(np.uint8)
    cond = partial(embed_edges, graphs[CONTROLNET_COND])
    np.testing.assert_allclose(tiled_encoder(cond, grid)(edges), cond(edges), atol=1e-4)
    encoder = partial(encode, graphs[VAE_ENCODER])
    (mean, std), tiled = encoder(rgb[None]), tiled_encoder(encoder, grid)(rgb[None])
    # The encoder looks 84 pixels far, beyond the 20 to 40 that count for nothing, though with little weight.
    assert max(np.abs(found - whole).max() for found, whole in zip(tiled, (mean, std), strict=True)) < 0.02 * mean.std()
    decoder = graphs[VAE_DECODER]
    found = tiled_decoder(partial(decode_rgb, decoder), grid)(mean).astype(int)
    assert np.abs(found - decode(decoder, mean)).max() <= 3
