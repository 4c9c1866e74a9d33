"""Styles, solvers and palettes of a batch: each against its definition, written out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsast import UsageError
from lsast.options.options import Options
from lsast.options.style_mix import Mix
from lsast.sampling.batch import Batch, BatchSolver, MixedStyle, Palette, Sample, X0Blend
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.manifest import AttentionLayer
from lsast_engines.bundle.style import LatentStatistics, Style, StyleFile, encode_defaults
from lsast_engines.diffusion import NoiseLevel, NoiseSchedule, TimestepSchedule, make_solver

BASE = "ab" * 32
# Groups lie across each other on purpose: U-Net 8 columns down, 4 up, 6 down, 2 mid; ControlNet 4 mid, 6 down.
LAYERS = [
    AttentionLayer("a", "unet", "down", 0, 4),
    AttentionLayer("b", "unet", "up", 8, 2),
    AttentionLayer("c", "unet", "down", 12, 3),
    AttentionLayer("d", "unet", "mid", 18, 1),
    AttentionLayer("e", "control", "mid", 0, 2),
    AttentionLayer("f", "control", "down", 4, 3),
]
GROUP_OF = {"kv_unet": ["down"] * 8 + ["up"] * 4 + ["down"] * 6 + ["mid"] * 2, "kv_control": ["mid"] * 4 + ["down"] * 6}
STAGES = 10


def _style(name: str, seed: int, stages: int = STAGES) -> Style:
    rng = np.random.default_rng(seed)
    shapes = [(stages, 3, 20), (stages, 3, 10)]
    return Style(name, BASE, stages, 3, *(rng.standard_normal(shape).astype(np.float32) for shape in shapes))


STYLES = {name: _style(name, seed) for seed, name in enumerate(("vangogh", "monet", "roerich"))}
NULL = _style("null", 9, stages=1)


def _mixed(text: str) -> MixedStyle:
    return MixedStyle(Mix.parse(text), STYLES, NULL, LAYERS)


def _weights(stage: int, group: str, text: str) -> dict[str, float]:
    """The definition, written once more: weights of the terms that apply to a cell."""
    weights: dict[str, float] = {}
    for term in text.split("+"):
        name, *places = term.split("@")
        name, _, weight = name.partition(":")
        groups = [place for place in places if place.isalpha()]
        ranges = [[int(end) for end in place.split("-")] for place in places if not place.isalpha()]
        if all(group == wanted for wanted in groups) and all(ends[0] <= stage <= ends[-1] for ends in ranges):
            weights[name] = weights.get(name, 0.0) + float(weight or 1)
    return weights


MIXES = [
    "vangogh",
    "vangogh:0.6+monet:0.4",
    "vangogh:3+monet+roerich:2",
    "vangogh@up",
    "monet@0-4",
    "monet@7",
    "vangogh:0.7@up+monet@0-4",
    "vangogh@0-4@down+monet:2@down@3-9+roerich@mid",
    "vangogh+vangogh:2@up+monet",
]


@pytest.mark.parametrize("text", MIXES)
def test_mixed_style_is_the_weighted_mean_of_the_terms_that_apply(text):
    mixed = _mixed(text)
    for stage in range(STAGES):
        row = mixed.stage(stage)
        for tensor, groups in GROUP_OF.items():
            found = getattr(row, tensor)
            assert found.dtype == np.float32
            for column, group in enumerate(groups):
                weights = _weights(stage, group, text)
                parts = [
                    weight / sum(weights.values()) * getattr(STYLES[name], tensor)[stage, :, column].astype(float)
                    for name, weight in weights.items()
                ]
                expected = sum(parts) if parts else getattr(NULL, tensor)[0, :, column]
                np.testing.assert_allclose(found[:, column], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("text", ["vangogh", "vangogh:0.3", "vangogh+vangogh", "vangogh@down+vangogh@mid+vangogh@up"])
def test_mixed_style_of_one_style_is_that_style_to_the_bit(text):
    for stage in range(STAGES):
        np.testing.assert_array_equal(_mixed(text).stage(stage).kv_unet, STYLES["vangogh"].kv_unet[stage])
        np.testing.assert_array_equal(_mixed(text).stage(stage).kv_control, STYLES["vangogh"].kv_control[stage])


def test_mixed_style_reads_a_null_of_many_stages_by_stage_and_leaves_it_alone():
    null = _style("null", 11)
    before = null.kv_unet.copy()
    row = MixedStyle(Mix.parse("vangogh@up"), STYLES, null, LAYERS).stage(6)
    np.testing.assert_array_equal(row.kv_unet[:, :8], null.kv_unet[6, :, :8])
    np.testing.assert_array_equal(null.kv_unet, before)


@pytest.fixture
def fields(bundle_path: Path) -> dict[str, Any]:
    """Fields of a `Sample`."""
    bundle, pixels = Bundle.open(bundle_path), np.zeros((48, 64), np.uint8)
    schedule = TimestepSchedule.build(bundle.manifest.noise, 4, 0.5, 10)
    return {"picture": np.dstack([pixels] * 3), "edges": pixels, "style": bundle.style("monet"), "schedule": schedule,
            "blends": lambda _: (), "guidance": 2.0, "seed": 0}  # fmt: skip


def test_batch_solver_with_x0_blends_blends_the_predicted_x0_with_one_after_the_other(fields):
    rng, schedule = np.random.default_rng(1), TimestepSchedule.build(NoiseSchedule(), 12, 0.7, 10)
    share = rng.uniform(size=(6, 8)).astype(np.float32)
    share[0], share[1] = 0, 1
    z0, before, n = rng.standard_normal((3, 4, 6, 8), dtype=np.float32)
    fields |= {"schedule": schedule, "blends": lambda z0: [X0Blend(z0, 1 - share), X0Blend(before, share / 2)]}
    solver = BatchSolver([Sample(**fields)], z0[None])
    found, abar = schedule.add_noise(z0, n), NoiseSchedule().alphas_cumprod
    z = np.sqrt(abar[schedule.start_t]) * z0.astype(float) + np.sqrt(1 - abar[schedule.start_t]) * n
    ends = [abar[step.t] for step in schedule.steps[1:]] + [abar[0]]
    for step, b in zip(schedule.steps, ends, strict=True):
        noise, expected_noise = (np.sin(3 * latent + step.t / 100) for latent in (found, z))
        (found,) = solver.step(noise[None], step.index, found[None])
        a = abar[step.t]
        x0 = (z - np.sqrt(1 - a) * expected_noise) / np.sqrt(a)
        x0 = share * x0 + (1 - share) * z0
        x0 = (1 - share / 2) * x0 + share / 2 * before
        np.testing.assert_allclose(solver.x0[0], x0, atol=2e-4)
        eps = (z - np.sqrt(a) * x0) / np.sqrt(1 - a)
        z = np.sqrt(b) * x0 + np.sqrt(1 - b) * eps
    np.testing.assert_allclose(found, z, atol=2e-4)


MONET = LatentStatistics((0.1, -0.2, 0.3, 0.0), (0.5, 0.6, 0.7, 0.8))
GOYA = LatentStatistics((0.5, 0.2, 0.7, 0.4), (0.9, 1.0, 1.1, 1.2))


def moments(latent: np.ndarray) -> np.ndarray:
    return np.stack([latent.mean((1, 2)), latent.std((1, 2))])


def test_match_leads_the_moments_of_a_latent_towards_the_palettes():
    latent = np.random.default_rng(0).normal(0.7, 2, (4, 6, 8)).astype(np.float32)
    wanted = np.array([MONET.mean, MONET.std])
    for amount in (0, 0.25, 1):
        found = moments(Palette.of([(1.0, MONET)], amount).match(latent))
        np.testing.assert_allclose(found, moments(latent) + amount * (wanted - moments(latent)), atol=1e-5)
    flat = np.zeros((4, 6, 8), np.float32)
    np.testing.assert_allclose(moments(Palette.of([(1.0, MONET)], 1).match(flat))[0], MONET.mean, atol=1e-6)


def test_palette_of_a_mix_is_the_weighted_mean():
    mixed = Palette.of([(3.0, MONET), (1.0, GOYA)], 0.5)
    np.testing.assert_allclose(mixed.mean.ravel(), [0.2, -0.1, 0.4, 0.1], atol=1e-6)
    np.testing.assert_allclose(mixed.std.ravel(), [0.6, 0.7, 0.8, 0.9], atol=1e-6)


def test_limit_narrows_the_predicted_picture_to_the_palettes_deviation_and_widens_none():
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


def test_palette_is_by_style_off_where_there_is_none_and_refused_by_name(styles, bundle_path):
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


def test_batch_with_a_palette_starts_from_and_steps_with_its_latents(bundle_path, fields):
    palette, rng, schedule = Palette.of([(1.0, MONET)], 1), np.random.default_rng(2), fields["schedule"]
    batch = Batch([Sample(**fields, palette=palette), Sample(**fields)], Bundle.open(bundle_path).null_style, 1.0)
    z0, noise, eps = (rng.standard_normal((2, 4, 6, 8), dtype=np.float32) for _ in range(3))
    z = batch.add_noise(z0, noise)
    np.testing.assert_array_equal(z[0], schedule.add_noise(palette.match(z0[0]), noise[0]))
    np.testing.assert_array_equal(z[1], schedule.add_noise(z0[1], noise[1]))
    after = BatchSolver(batch.samples, z0).step(eps, 0, z)
    limited = palette.limit(eps[0], z[0], schedule.levels()[0])
    np.testing.assert_array_equal(after[0], make_solver(schedule).step(limited, 0, z[0]))
    np.testing.assert_array_equal(after[1], make_solver(schedule).step(eps[1], 0, z[1]))


def test_batch_style_has_the_nulls_row_of_its_stage_before_the_styles(bundle_path, fields):
    style = Bundle.open(bundle_path).style("monet")
    null = replace(style, kv_unet=style.kv_unet[::-1] + 1)
    found = Batch([Sample(**fields)], null, 1.0).style((6,)).kv_unet
    np.testing.assert_array_equal(found[:, 0], [null.kv_unet[6], style.kv_unet[6]])
