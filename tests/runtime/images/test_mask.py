"""Where is painted, and which colours are kept: against the picture's own bytes, and against Pillow's Y'CbCr."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from lsast import PictureError
from lsast.images.mask import composite, keep_colour, read_mask, to_latent_mask
from lsast_engines.diffusion import NoiseSchedule


@pytest.fixture
def picture() -> np.ndarray:
    """A picture [64, 128, 3] that fills its canvas: on the tiny graphs no cell of 8 x 8 knows of another."""
    return np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)


def _mask(height: int = 64, width: int = 128) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[16:48, 24:80] = 255
    return mask


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m", "unipc", "ddim_lsast"])
def test_stylize_with_a_mask_paints_inside_and_keeps_the_outside_exactly(stylizer, picture, solver):
    options: dict[str, Any] = {"size": 0, "solver": solver, "guidance": 3.0}
    inside = _mask() == 255
    masked = np.asarray(stylizer.stylize(picture, mask=_mask(), feather=0, **options))
    np.testing.assert_array_equal(masked[~inside], picture[~inside])
    np.testing.assert_array_equal(masked[inside], np.asarray(stylizer.stylize(picture, **options))[inside])
    assert (masked[inside] != picture[inside]).mean() > 0.9


@pytest.mark.parametrize(("solver", "rest"), [("ddim", True), ("dpmpp2m", False), ("unipc", False)])
def test_stylize_with_a_mask_keeps_the_latent_outside(stylizer, picture, runs, solver, rest):
    """There the latent ends as z0, noised to where the schedule ends."""
    mask = _mask()
    mask[:, 120:] = 51  # a fifth
    options: dict[str, Any] = {"feather": 0, "size": 0, "solver": solver, "strength": 0.7}
    stylizer.stylize(picture, **options, mask=mask)
    stylizer.stylize(picture, **options)
    run, free = runs
    mean, std = run.networks.vae_encoder(run.batch.pictures)
    draws = np.random.Generator(np.random.PCG64(0)).standard_normal((2, *mean.shape[1:]), dtype=np.float32)
    z0 = run.networks.latent_scale * (mean + std * draws[0])[0]
    abar = NoiseSchedule().alphas_cumprod[0] if rest else 1.0
    kept, latent = np.sqrt(abar) * z0 + np.sqrt(1 - abar) * draws[1], run.latents[0]
    inside, outside = (mask[::8, ::8] == value for value in (255, 0))
    np.testing.assert_allclose(latent[:, outside], kept[:, outside], atol=1e-4)
    np.testing.assert_allclose(latent[:, inside], free.latents[0][:, inside], atol=1e-4)
    assert np.abs(latent[:, ~outside] - kept[:, ~outside]).min(axis=0).max() > 1e-2
    assert np.abs(free.latents[0][:, outside] - kept[:, outside]).max() > 0.1
    [blend] = run.batch.samples[0].blends(z0)
    np.testing.assert_allclose(blend.weight, 1 - mask[::8, ::8] / 255, atol=1e-6)


def test_read_mask_with_feather_fades_inside_the_mask(stylizer, picture):
    inside = _mask() == 255
    masked = np.asarray(stylizer.stylize(picture, mask=_mask(), feather=10, size=0))
    np.testing.assert_array_equal(masked[~inside], picture[~inside])
    share = read_mask(_mask(), (64, 128), 10)
    assert (share[~inside] == 0).all()
    # The nearest unpainted pixel is d away: d / 11 of the painting, all of it from 11 on.
    expected = [round(255 * min(distance / 11, 1)) for distance in range(1, 17)]
    assert share[16:32, 52].tolist() == expected
    assert share[32, 24:40].tolist() == expected


def test_read_mask_does_not_fade_at_the_edge_of_the_picture():
    whole = read_mask(np.full((32, 48), 255, np.uint8), (32, 48), 16)
    assert (whole == 255).all()
    half = np.zeros((32, 48), np.uint8)
    half[:, :24] = 255
    assert read_mask(half, (32, 48), 4)[:, 0].tolist() == [255] * 32


def test_read_mask_takes_any_kind_of_picture(tmp_path):
    grey = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (8, 1))
    Image.fromarray(grey).save(tmp_path / "m.png")
    clear = Image.merge("LA", [Image.new("L", (24, 8), 255), Image.fromarray(grey)])
    for source in (grey, Image.fromarray(grey).convert("RGB"), tmp_path / "m.png", clear):
        np.testing.assert_array_equal(read_mask(source, (8, 24), 0), grey)
    coloured = np.random.default_rng(0).integers(0, 256, (8, 24, 3), dtype=np.uint8)
    luma = np.asarray(Image.fromarray(coloured).convert("L")).astype(int)
    assert np.abs(read_mask(coloured, (8, 24), 0) - luma).max() <= 1


def test_read_mask_of_another_size_names_the_expected_one(stylizer, picture):
    with pytest.raises(PictureError, match=r"mask of 64 x 128 pixels; expected 128 x 64"):
        stylizer.stylize(picture, mask=_mask().T)


def test_stylize_with_fit_stretch_stretches_the_mask(stylizer, photo):
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[:48] = 255
    result = np.asarray(stylizer.stylize(photo, mask=mask, feather=0, fit="stretch", size=128))
    stretched = np.asarray(Image.fromarray(photo).resize((128, 128), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(result[70:], stretched[70:])
    assert (result[:58] != stretched[:58]).mean() > 0.9


def test_stylize_with_a_mask_keeps_transparency(stylizer, picture):
    alpha = np.tile(np.arange(128, dtype=np.uint8) * 2, (64, 1))
    result = np.asarray(stylizer.stylize(np.dstack([picture, alpha]), mask=_mask(), feather=0))
    np.testing.assert_array_equal(result[..., 3], alpha)
    np.testing.assert_array_equal(result[48:, :, :3], picture[48:])


def test_composite_with_a_grey_mask_paints_in_part():
    painted, picture = (np.full((1, 1, 3), value, np.uint8) for value in (200, 100))
    assert composite(painted, picture, np.full((1, 1), 51, np.uint8)).tolist() == [[[120] * 3]]


def test_to_latent_mask_gives_means_of_cells():
    mask = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    expected = [[mask[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].mean() / 255 for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(to_latent_mask(mask, 8), expected, rtol=1e-6)


def test_keep_colour_joins_the_pictures_chroma_and_the_paintings_luma():
    rng = np.random.default_rng(0)
    picture, painted = (rng.integers(90, 166, (40, 40, 3), dtype=np.uint8) for _ in range(2))
    kept = keep_colour(painted, picture)
    bands = [np.asarray(Image.fromarray(rgb).convert("YCbCr")).astype(int) for rgb in (kept, painted, picture)]
    assert np.abs(bands[0][..., 0] - bands[1][..., 0]).max() <= 1
    assert np.abs(bands[0][..., 1:] - bands[2][..., 1:]).max() <= 1


def test_stylize_with_keep_colour_changes_the_finished_painting_alone(stylizer, photo):
    plain, kept = (np.asarray(stylizer.stylize(photo, keep_colour=keep)) for keep in (False, True))
    np.testing.assert_array_equal(kept, keep_colour(plain, photo))
    assert (plain != kept).any()
