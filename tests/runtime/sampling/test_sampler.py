"""The whole path of one picture, with step caching too, against plain numpy for the graphs and diffusers for the
scheduler."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch

import schedulers
from lsast import Stylizer
from lsast_engines.bundle.bundle import Bundle

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
