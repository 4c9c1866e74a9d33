"""The whole path of one picture against plain numpy for the graphs and diffusers for the scheduler."""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import lsast
import schedulers
from lsast import Stylizer
from lsast_engines.backends.registry import available_backends
from lsast_engines.bundle.bundle import Bundle

SCALE = 0.5  # latent_scale of the tiny bundle


@pytest.fixture(params=sorted(available_backends()))
def stylizer(request: pytest.FixtureRequest, bundle_path: Any) -> Iterator[Stylizer]:
    with lsast.load(bundle_path, backend=request.param) as opened:
        yield opened


def _paint_by_hand(weights: Any, bundle: Bundle, rgb: np.ndarray, edges: np.ndarray, options: dict[str, Any]) -> Any:
    """The released algorithm (docs/method.md §4.2) for one picture of legal size, on the tiny graphs' own matrices."""
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

    features = pooled(np.repeat(edges[:, :, None], 3, axis=2).astype(float)) @ weights.hint.T
    held = (features @ weights.edges.T).transpose(2, 0, 1)  # [4, h, w]

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
    for t in timesteps:
        stage = int(t) // 100
        shared = z.numpy()[0] / 2 + float(t) / 1000 * weights.time[0][:, None, None]
        gate = style.kv_control[stage].astype(float).mean(axis=0) @ weights.control
        shared = shared + options["control_scale"] * held * gate[:, None, None]
        eps_c, eps_u = (
            shared + (kv.astype(float).mean(axis=0) @ weights.unet)[:, None, None]
            for kv in (style.kv_unet[stage], null.kv_unet[0])
        )
        eps = eps_u + options["guidance"] * (eps_c - eps_u)
        z = scheduler.step(torch.from_numpy(eps[None]), t, z).prev_sample
    image = np.einsum("rc,chw->hwr", weights.decode, z.numpy()[0] / SCALE)
    return np.repeat(np.repeat(image, 8, axis=0), 8, axis=1)


CASES: list[dict[str, Any]] = [
    {},
    {"solver": "dpmpp2m", "steps": 12, "seed": 3},
    {"solver": "unipc", "steps": 9, "strength": 1.0, "style": "monet"},
    {"guidance": 1.0, "control_scale": 0.0},
    {"guidance": 0.0, "control_scale": 2.0, "strength": 0.05},
    {"steps": 50, "strength": 0.7, "guidance": 5.0, "control_scale": 0.4},
    {"steps": 50, "strength": 0.7, "solver": "ddim_lsast"},
]


@pytest.mark.parametrize("change", CASES, ids=str)
def test_stylize_gives_what_the_algorithm_says(stylizer, weights, change):
    rng = np.random.default_rng(5)
    rgb = np.repeat(np.repeat(rng.integers(60, 200, (8, 16, 3), dtype=np.uint8), 8, axis=0), 8, axis=1)
    edges = (cv2.Canny(rgb, 100, 200) > 0).astype(np.uint8)
    assert 0.01 < edges.mean() < 0.5
    options = {**stylizer.bundle.manifest.defaults, "seed": 0, **change, "size": 0}

    expected = (_paint_by_hand(weights, stylizer.bundle, rgb, edges, options) + 1) * 127.5
    assert np.mean((expected > 0) & (expected < 255)) > 0.5, "a painting that is clipped proves nothing"
    found = np.asarray(stylizer.stylize(rgb, **options).image).astype(int)
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
