"""The predicted clean latent blended with the picture's, as a mask does: its formula against DDIM written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lsast.sampling import sampler
from lsast.sampling.x0_blend import X0Blend
from lsast_engines.bundle.style import Style
from lsast_engines.diffusion.noise_schedule import NoiseSchedule
from lsast_engines.diffusion.solvers import make_solver
from lsast_engines.diffusion.timesteps import TimestepSchedule


class _Wavy:
    """A denoiser whose noise is a function of latent and time, and of nothing else."""

    backend, compute_dtype = "numpy", "fp32"

    def bind_inputs(self, feeds: Any) -> None:
        pass

    def release_memory(self) -> None:
        pass

    def __call__(self, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"eps": _eps(feeds["latent"], feeds["timestep"][0])[None].astype(np.float32)}


def _eps(latent: np.ndarray, t: int) -> np.ndarray:
    return np.sin(3 * latent + t / 100)


def _run(solver: str, share: Any, steps: int = 12, watch: Any = None) -> tuple[np.ndarray, Any]:
    """Denoise two latents with a fake denoiser; the result, and what went in."""
    noise, rng = NoiseSchedule(), np.random.default_rng(0)
    schedule = TimestepSchedule.build(noise, steps, 0.7, 10, solver)
    z0, n = (rng.standard_normal((4, 6, 8)).astype(np.float32) for _ in range(2))
    style = Style("s", "ab", 10, 1, np.zeros((10, 1, 1)), np.zeros((10, 1, 1)))
    made = make_solver(solver, noise, schedule)
    row = sampler.Row(
        solver=made if share is None else X0Blend(made, schedule, z0, 1 - share),
        schedule=schedule,
        z0=z0,
        noisy=schedule.add_noise(z0, n, schedule.start_t),
        hint=np.zeros((1, 6, 8), np.float32),
        hand=style,
        guidance=1.0,
    )
    return sampler.denoise(_Wavy(), [row], style, 1.0, watch)[0], (schedule, z0, n)  # type: ignore[arg-type]


def test_denoise_with_a_share_blends_the_predicted_x0_with_the_picture() -> None:
    share = np.random.default_rng(1).uniform(size=(6, 8)).astype(np.float32)
    share[0], share[1] = 0, 1
    guesses: list[np.ndarray] = []
    found, (schedule, z0, n) = _run("ddim", share, watch=lambda step, total, now: guesses.append(now[0]))
    abar = NoiseSchedule().alphas_cumprod()
    t = schedule.start_t
    z = np.sqrt(abar[t]) * z0.astype(float) + np.sqrt(1 - abar[t]) * n
    for step in schedule.steps:
        a = abar[step.t]
        x0 = (z - np.sqrt(1 - a) * _eps(z, step.t)) / np.sqrt(a)
        x0 = share * x0 + (1 - share) * z0
        np.testing.assert_allclose(guesses[step.index + 1], x0, atol=2e-4)
        eps = (z - np.sqrt(a) * x0) / np.sqrt(1 - a)
        b = abar[step.t_prev] if step.t_prev >= 0 else abar[0]
        z = np.sqrt(b) * x0 + np.sqrt(1 - b) * eps
    np.testing.assert_allclose(found, z, atol=2e-4)


@pytest.mark.parametrize(("solver", "rest"), [("ddim", True), ("dpmpp2m", False), ("unipc", False)])
def test_denoise_where_the_share_is_0_keeps_the_picture_with_every_solver(solver: str, rest: bool) -> None:
    """In one half of the latent nothing is painted: it ends as z0, noised to where the schedule ends."""
    share = np.ones((6, 8), np.float32)
    share[:, :4] = 0
    found, (_, z0, n) = _run(solver, share)
    free, _ = _run(solver, None)
    abar = NoiseSchedule().alphas_cumprod()[0] if rest else 1.0
    expected = np.sqrt(abar) * z0 + np.sqrt(1 - abar) * n
    np.testing.assert_allclose(found[:, :, :4], expected[:, :, :4], atol=1e-3)
    np.testing.assert_allclose(found[:, :, 4:], free[:, :, 4:], atol=1e-3)
    assert np.abs(free[:, :, :4] - expected[:, :, :4]).max() > 0.1


def test_x0_blend_around_another_blends_one_after_the_other() -> None:
    noise, rng = NoiseSchedule(), np.random.default_rng(2)
    schedule = TimestepSchedule.build(noise, 12, 0.7, 10, "ddim")
    x, eps, picture, before = (rng.standard_normal((4, 6, 8)).astype(np.float32) for _ in range(4))
    inner = X0Blend(make_solver("ddim", noise, schedule), schedule, before, np.full((6, 8), 0.85, np.float32))
    outer = X0Blend(inner, schedule, picture, np.full((6, 8), 0.4, np.float32))
    outer.step(eps, 3, x)
    abar = noise.alphas_cumprod()[schedule.steps[3].t]
    x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
    np.testing.assert_allclose(outer.x0, 0.85 * before + 0.15 * (0.4 * picture + 0.6 * x0), atol=1e-5)
