"""The whole path of one picture, with step caching too, against plain numpy for the graphs and diffusers for the
scheduler; and styles, solvers and palettes of a batch, each against its definition, written out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import schedulers
from lsast import Stylizer, UsageError
from lsast.options.options import Options
from lsast.options.style_mix import Mix
from lsast.sampling.sampler import Batch, BatchSolver, MixedStyle, Palette, Sample, X0Blend
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.manifest import AttentionLayer
from lsast_engines.bundle.style import LatentStatistics, Style, StyleFile, encode_defaults
from lsast_engines.diffusion import NoiseLevel, NoiseSchedule, TimestepSchedule, make_solver

SCALE = 0.5  # latent_scale of the tiny bundle


@pytest.fixture
def stylizer(split_stylizer: Stylizer) -> Stylizer:
    return split_stylizer


def _coarse(held: np.ndarray) -> np.ndarray:
    """What of [4, h, w] a level further down sees."""
    means = held.reshape(4, held.shape[1] // 2, 2, held.shape[2] // 2, 2).mean(axis=(2, 4))
    return np.repeat(np.repeat(means, 2, axis=1), 2, axis=2)


def _sample_by_hand(weights: Any, bundle: Bundle, rgb: np.ndarray, edges: np.ndarray, options: dict[str, Any]) -> Any:
    """The released algorithm (docs/method.md §4.2) for one picture of legal size, on the tiny graphs' own matrices: the
    latent. With step caching, in the words of `Options`; nothing of `lsast.sampling.networks` is in it."""
    style, null = bundle.style(options["style"]), bundle.null_style
    height, width = rgb.shape[:2]

    def pooled(image: np.ndarray) -> np.ndarray:  # [H, W, 3] -> [h, w, 3]
        return image.reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3))

    small = pooled(rgb / 127.5 - 1.0)
    mean = (small @ weights.encode_mean.T).transpose(2, 0, 1)[None]
    std = np.abs(small @ weights.encode_std.T).transpose(2, 0, 1)[None]
    rng = np.random.Generator(np.random.PCG64(options["seed"]))
    posterior, start = (rng.standard_normal(mean.shape, dtype=np.float32) for _ in range(2))
    z0 = torch.from_numpy(SCALE * (mean + std * posterior))

    hint = pooled(np.repeat(edges[:, :, None], 3, axis=2).astype(float)) @ weights.hint.T
    edge_map = (hint @ weights.edges.T).transpose(2, 0, 1)  # [4, h, w]
    abars = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)

    scheduler = schedulers.scheduler("ddim" if options["solver"] == "ddim_lsast" else options["solver"])
    scheduler.set_timesteps(options["steps"])
    run = max(1, int(options["steps"] * options["strength"]))
    skipped = options["steps"] - run
    if options["solver"] in ("dpmpp2m", "unipc"):  # DDIM has no memory of where it is
        scheduler.set_begin_index(skipped)
    timesteps = scheduler.timesteps[skipped:]
    # The released code noises one grid point further up than it begins.
    noised_to = scheduler.timesteps[skipped - 1 :][:1] if options["solver"] == "ddim_lsast" else timesteps[:1]
    z = scheduler.add_noise(z0, torch.from_numpy(start.astype(float)), noised_to)
    full: list[tuple[float, np.ndarray]] = []  # of the full steps sigma, and ControlNet's residual with both features
    for index, t in enumerate(timesteps):
        sigma = np.sqrt(1 - abars[int(t)])
        if index % options["cache_interval"] == 0:
            stage = int(t) // 100
            gate = style.kv_control[stage].astype(float).mean(axis=0) @ weights.control
            held = options["control_scale"] * edge_map * gate[:, None, None]
            deep = _coarse(held) + float(t) / 1000 * weights.time[0][:, None, None]
            kv = (style.kv_unet[stage], null.kv_unet[0])
            features = [(row.astype(float).mean(axis=0) @ weights.unet)[:, None, None] + deep for row in kv]
            full.append((sigma, np.stack([held, *features])))
        (before, old), (last, new) = full[-2:] if len(full) > 1 else (full[0], full[0])
        share = (sigma - last) / (last - before) if last != before else 0.0
        held, feature_c, feature_u = new + share * (new - old)
        shallow = z.numpy()[0] / 2 + held - _coarse(held)
        eps = shallow + feature_u + options["guidance"] * (feature_c - feature_u)
        z = scheduler.step(torch.from_numpy(eps[None]), t, z).prev_sample
    return z.numpy()[0]


CASES: list[dict[str, Any]] = [
    {},
    {"solver": "dpmpp2m", "steps": 12, "seed": 3},
    {"solver": "unipc", "steps": 9, "strength": 1.0, "style": "monet"},
    {"guidance": 1.0, "control_scale": 0.0},
    {"guidance": 0.0, "control_scale": 2.0, "strength": 0.05},
    {"steps": 50, "strength": 0.7, "guidance": 5.0, "control_scale": 0.4},
    {"steps": 50, "strength": 0.7, "solver": "ddim_lsast"},
    {"cache_interval": 3, "steps": 12},
    {"cache_interval": 2, "steps": 12, "guidance": 1.0},
    {"cache_interval": 2, "steps": 12, "solver": "unipc"},
    {"cache_interval": 4, "steps": 12, "solver": "dpmpp2m"},
]


@pytest.mark.parametrize("change", CASES, ids=str)
def test_stylize_gives_what_the_algorithm_says(stylizer, weights, runs, change):
    rng = np.random.default_rng(5)
    rgb = np.repeat(np.repeat(rng.integers(60, 200, (8, 16, 3), dtype=np.uint8), 8, axis=0), 8, axis=1)
    edges = (cv2.Canny(rgb, 100, 200) > 0).astype(np.uint8)
    assert 0.01 < edges.mean() < 0.5
    plain = {**stylizer.bundle.manifest.defaults, "seed": 0, **change, "size": 0, "cache_interval": 1}
    options = plain | change
    found = np.asarray(stylizer.stylize(rgb, **options).image).astype(int)

    latent = _sample_by_hand(weights, stylizer.bundle, rgb, edges, options)
    np.testing.assert_allclose(runs[0].latents[0], latent, atol=2e-4 * np.abs(latent).max())
    if options != plain:
        other = _sample_by_hand(weights, stylizer.bundle, rgb, edges, plain)
        assert np.abs(other - latent).max() > 1e-2 * np.abs(latent).max(), "no change proves nothing"
    image = np.einsum("rc,chw->hwr", weights.decode, latent / SCALE)
    expected = (np.repeat(np.repeat(image, 8, axis=0), 8, axis=1) + 1) * 127.5
    assert np.mean((expected > 0) & (expected < 255)) > 0.5, "a painting that is clipped proves nothing"
    assert np.abs(found - np.clip(expected, 0, 255)).max() < 0.51


def test_stylize_binds_what_changes_and_one_row_without_guidance(stylizer, photo, monkeypatch):
    engine, calls = stylizer._pool.engine("denoiser"), []
    bind = engine.bind_inputs

    def bind_inputs(feeds: dict[str, np.ndarray]) -> None:
        calls.append({name: value.shape for name, value in feeds.items()})
        bind(feeds)

    monkeypatch.setattr(engine, "bind_inputs", bind_inputs)
    for guidance, rows in ((1.0, 1), (2.0, 2)):
        calls.clear()
        stylizer.stylize(photo, guidance=guidance)
        first, *others = (sorted(call) for call in calls)  # seven steps, each of a stage of its own
        assert (first, others) == (["control_scale", "hint", "kv_control", "kv_unet"], [["kv_control", "kv_unet"]] * 6)
        assert {call["kv_unet"] for call in calls} == {(rows, 1, 3, 24)}


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
