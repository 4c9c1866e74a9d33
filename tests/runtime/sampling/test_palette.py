"""The artist's palette against the formula of adaptive instance normalisation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsast import UsageError
from lsast.options.options import Options
from lsast.sampling.batch import Batch, Palette, Sample
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.style import LatentStatistics, StyleFile, encode_defaults
from lsast_engines.diffusion import NoiseLevel, TimestepSchedule, make_solver

MONET = LatentStatistics((0.1, -0.2, 0.3, 0.0), (0.5, 0.6, 0.7, 0.8))
GOYA = LatentStatistics((0.5, 0.2, 0.7, 0.4), (0.9, 1.0, 1.1, 1.2))


def moments(latent: np.ndarray) -> np.ndarray:
    return np.stack([latent.mean((1, 2)), latent.std((1, 2))])


def test_match_leads_the_moments_of_a_latent_towards_the_palettes() -> None:
    latent = np.random.default_rng(0).normal(0.7, 2, (4, 6, 8)).astype(np.float32)
    wanted = np.array([MONET.mean, MONET.std])
    for amount in (0, 0.25, 1):
        found = moments(Palette.of([(1.0, MONET)], amount).match(latent))
        np.testing.assert_allclose(found, moments(latent) + amount * (wanted - moments(latent)), atol=1e-5)
    flat = np.zeros((4, 6, 8), np.float32)
    np.testing.assert_allclose(moments(Palette.of([(1.0, MONET)], 1).match(flat))[0], MONET.mean, atol=1e-6)


def test_palette_of_a_mix_is_the_weighted_mean() -> None:
    mixed = Palette.of([(3.0, MONET), (1.0, GOYA)], 0.5)
    np.testing.assert_allclose(mixed.mean.ravel(), [0.2, -0.1, 0.4, 0.1], atol=1e-6)
    np.testing.assert_allclose(mixed.std.ravel(), [0.6, 0.7, 0.8, 0.9], atol=1e-6)


def test_limit_narrows_the_predicted_picture_to_the_palettes_deviation_and_widens_none() -> None:
    rng, level = np.random.default_rng(1), NoiseLevel.of(0.3)
    x, eps = (rng.standard_normal((4, 6, 8), dtype=np.float32) for _ in range(2))
    x[0] /= 8
    eps[0] /= 8
    before = moments(level.x0(x, eps))
    found = moments(level.x0(x, Palette.of([(1.0, MONET)], 1).limit(eps, x, level)))
    np.testing.assert_allclose(found[0], before[0], atol=1e-5)
    np.testing.assert_allclose(found[1], np.minimum(before[1], MONET.std), atol=1e-5)
    assert before[1, 0] < MONET.std[0]
    assert (before[1, 1:] > MONET.std[1:]).all()


@pytest.fixture
def styles(tmp_path: Path, bundle_path: Path) -> dict[str, StyleFile]:
    """``monet`` with a palette and its default, ``vangogh`` without."""
    monet = Bundle.open(bundle_path).style("monet")
    monet.meta.update(MONET.to_meta() | encode_defaults({"palette": 0.6}))
    monet.save(tmp_path / "monet.safetensors")
    files = {"monet": tmp_path, "vangogh": bundle_path / "styles"}
    return {name: StyleFile(folder / f"{name}.safetensors") for name, folder in files.items()}


def test_palette_is_by_style_off_where_there_is_none_and_refused_by_name(
    styles: dict[str, StyleFile], bundle_path: Path
) -> None:
    defaults = Bundle.open(bundle_path).manifest.defaults

    def palette(*names: str, **given: Any) -> float:
        chosen = {"style": "+".join(names), **given}
        return Options.resolve(chosen, defaults, {name: styles[name] for name in names}).palette

    assert palette("monet") == 0.6
    assert palette("monet", palette=0.2) == 0.2
    assert palette("monet", preset="released") == 0
    assert palette("vangogh") == palette("monet", "vangogh") == palette("vangogh", palette=0) == 0
    with pytest.raises(UsageError, match=r"found palette 0\.5 for vangogh, which holds no statistics"):
        palette("monet", "vangogh", palette=0.5)


@pytest.fixture
def sample(bundle_path: Path) -> dict[str, Any]:
    """Fields of a `Sample`."""
    bundle, pixels = Bundle.open(bundle_path), np.zeros((48, 64), np.uint8)
    schedule = TimestepSchedule.build(bundle.manifest.noise, 4, 0.5, 10)
    return {"picture": np.dstack([pixels] * 3), "edges": pixels, "style": bundle.style("monet"), "schedule": schedule,
            "solver": lambda _: make_solver(schedule), "guidance": 2.0, "seed": 0}  # fmt: skip


def test_batch_with_a_palette_starts_from_and_steps_with_its_latents(bundle_path: Path, sample: dict[str, Any]) -> None:
    palette, rng, schedule = Palette.of([(1.0, MONET)], 1), np.random.default_rng(2), sample["schedule"]
    batch = Batch([Sample(**sample, palette=palette), Sample(**sample)], Bundle.open(bundle_path).null_style, 1.0)
    z0, noise, eps = (rng.standard_normal((2, 4, 6, 8), dtype=np.float32) for _ in range(3))
    z = batch.add_noise(z0, noise)
    np.testing.assert_array_equal(z[0], schedule.add_noise(palette.match(z0[0]), noise[0]))
    np.testing.assert_array_equal(z[1], schedule.add_noise(z0[1], noise[1]))
    after = batch.solver(z0).step(eps, 0, z)
    limited = palette.limit(eps[0], z[0], schedule.levels()[0])
    np.testing.assert_array_equal(after[0], make_solver(schedule).step(limited, 0, z[0]))
    np.testing.assert_array_equal(after[1], make_solver(schedule).step(eps[1], 0, z[1]))


def test_batch_style_has_the_nulls_row_of_its_stage_before_the_styles(
    bundle_path: Path, sample: dict[str, Any]
) -> None:
    style = Bundle.open(bundle_path).style("monet")
    null = replace(style, kv_unet=style.kv_unet[::-1] + 1)
    found = Batch([Sample(**sample)], null, 1.0).style((6,)).kv_unet
    np.testing.assert_array_equal(found[:, 0], [null.kv_unet[6], style.kv_unet[6]])
