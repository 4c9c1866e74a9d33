"""The predicted clean latent blended with the picture's, as a mask does: its formula against DDIM written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lsast.sampling.batch import Batch, Sample
from lsast.sampling.sampler import Networks, sample
from lsast.sampling.x0_blend import X0Blend
from lsast_engines.bundle.style import Style
from lsast_engines.diffusion import NoiseSchedule, TimestepSchedule, make_solver


class _Wavy:
    """A denoiser whose noise is a function of latent and time, and of nothing else."""

    def __call__(self, latent: Any, timestep: Any, hint: Any, style: Any, control_scale: Any) -> Any:
        return _eps(latent, timestep[0])[None].astype(np.float32)

    def release_memory(self) -> None: ...


def _eps(latent: np.ndarray, t: int) -> np.ndarray:
    return np.sin(3 * latent + t / 100)


def _run(solver: str, share: Any, steps: int = 12, watch: Any = None) -> tuple[np.ndarray, Any]:
    """Denoise a latent with a fake denoiser, `share` of it painted; the result, and what went in."""
    noise, rng = NoiseSchedule(), np.random.default_rng(0)
    schedule = TimestepSchedule.build(noise, steps, 0.7, 10, solver)
    z0 = rng.standard_normal((1, 4, 6, 8)).astype(np.float32)
    style = Style("s", "ab", 10, 1, np.zeros((10, 1, 1)), np.zeros((10, 1, 1)))

    def wrapped(z0: Any) -> Any:
        made = make_solver(schedule)
        return made if share is None else X0Blend(made, schedule, z0, 1 - share)

    picture = Sample(
        picture=np.zeros((48, 64, 3), np.uint8),
        edges=np.zeros((48, 64), np.uint8),
        style=style,
        schedule=schedule,
        solver=wrapped,
        guidance=1.0,
        seed=0,
    )
    networks = Networks(
        vae_encoder=lambda pictures: (z0, np.zeros_like(z0)),
        controlnet_cond=lambda edges: np.zeros((1, 1, 6, 8), np.float32),
        denoiser=_Wavy(),
        vae_decoder=lambda latents: np.zeros((1, 48, 64, 3), np.uint8),
        latent_scale=np.float32(1),
    )
    found, _ = sample(networks, Batch([picture], style, 1.0), watch)
    # What `Batch.noise` draws for seed 0: first for the encoder, then for the start.
    draws = np.random.Generator(np.random.PCG64(0)).standard_normal((2, 4, 6, 8), dtype=np.float32)
    return found[0], (schedule, z0[0], draws[1])


def test_sample_with_x0_blend_blends_the_predicted_x0_with_the_picture() -> None:
    share = np.random.default_rng(1).uniform(size=(6, 8)).astype(np.float32)
    share[0], share[1] = 0, 1
    guesses: list[np.ndarray] = []
    found, (schedule, z0, n) = _run("ddim", share, watch=lambda step, total, x0: guesses.append(x0()[0]))
    abar = NoiseSchedule().alphas_cumprod
    t = schedule.start_t
    z = np.sqrt(abar[t]) * z0.astype(float) + np.sqrt(1 - abar[t]) * n
    ends = [abar[step.t] for step in schedule.steps[1:]] + [abar[0]]
    for step, b in zip(schedule.steps, ends, strict=True):
        a = abar[step.t]
        x0 = (z - np.sqrt(1 - a) * _eps(z, step.t)) / np.sqrt(a)
        x0 = share * x0 + (1 - share) * z0
        np.testing.assert_allclose(guesses[step.index + 1], x0, atol=2e-4)
        eps = (z - np.sqrt(a) * x0) / np.sqrt(1 - a)
        z = np.sqrt(b) * x0 + np.sqrt(1 - b) * eps
    np.testing.assert_allclose(found, z, atol=2e-4)


@pytest.mark.parametrize(("solver", "rest"), [("ddim", True), ("dpmpp2m", False), ("unipc", False)])
def test_sample_where_the_blend_is_1_keeps_the_picture_with_every_solver(solver: str, rest: bool) -> None:
    """In one half of the latent nothing is painted: it ends as z0, noised to where the schedule ends."""
    share = np.ones((6, 8), np.float32)
    share[:, :4] = 0
    found, (_, z0, n) = _run(solver, share)
    free, _ = _run(solver, None)
    abar = NoiseSchedule().alphas_cumprod[0] if rest else 1.0
    expected = np.sqrt(abar) * z0 + np.sqrt(1 - abar) * n
    np.testing.assert_allclose(found[:, :, :4], expected[:, :, :4], atol=1e-3)
    np.testing.assert_allclose(found[:, :, 4:], free[:, :, 4:], atol=1e-3)
    assert np.abs(free[:, :, :4] - expected[:, :, :4]).max() > 0.1


def test_x0_blend_around_another_blends_one_after_the_other() -> None:
    noise, rng = NoiseSchedule(), np.random.default_rng(2)
    schedule = TimestepSchedule.build(noise, 12, 0.7, 10, "ddim")
    x, eps, picture, before = (rng.standard_normal((4, 6, 8)).astype(np.float32) for _ in range(4))
    inner = X0Blend(make_solver(schedule), schedule, before, np.full((6, 8), 0.85, np.float32))
    outer = X0Blend(inner, schedule, picture, np.full((6, 8), 0.4, np.float32))
    outer.step(eps, 3, x)
    abar = noise.alphas_cumprod[schedule.steps[3].t]
    x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
    np.testing.assert_allclose(outer.x0, 0.85 * before + 0.15 * (0.4 * picture + 0.6 * x0), atol=1e-5)
