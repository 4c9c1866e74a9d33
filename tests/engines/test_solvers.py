from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.numpy import load_file

import schedulers
from golden_sets import GoldenFiles, both_sets
from lsast_engines.diffusion import SOLVERS, NoiseSchedule, TimestepSchedule, guide, make_solver

SHAPE = (2, 4, 5, 3)


def started(name: str, steps: int, run: int) -> Any:
    """A diffusers scheduler about to take the last `run` of `steps` steps."""
    scheduler = schedulers.scheduler(name)
    scheduler.set_timesteps(steps)
    if name != "ddim":
        scheduler.set_begin_index(steps - run)
    return scheduler


def sharpen(scheduler: Any) -> None:
    """Give `scheduler` its noise levels in float64; it rounds them to float32."""
    abars = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
    if isinstance(scheduler, DDIMScheduler):
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = abars, abars[0]
    else:
        scheduler.sigmas = torch.cat([((1 - abars) / abars)[scheduler.timesteps] ** 0.5, torch.zeros(1)])


@pytest.mark.parametrize("name", schedulers.SOLVERS)
@pytest.mark.parametrize(("steps", "strength"), [(1, 1.0), (4, 0.3), (6, 0.5), (12, 0.7), (30, 0.7), (50, 1.0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_solver_steps_match_diffusers(name: str, steps: int, strength: float, dtype: type[np.floating[Any]]) -> None:
    rng = np.random.default_rng(steps)
    schedule = TimestepSchedule.build(NoiseSchedule(), steps, strength, 10, name)
    solver = make_solver(schedule)
    scheduler = started(name, steps, len(schedule.steps))
    if dtype is np.float64:
        sharpen(scheduler)
    # diffusers' DPM-Solver++ rounds the latent to float32 in either case. Of the largest value, because noise at random
    # instead of predicted makes latents grow far over 1.
    tolerance = 1e-5 if dtype is np.float32 else 1e-6 if name == "dpmpp2m" else 1e-9
    ours = rng.standard_normal(SHAPE).astype(dtype)
    theirs = torch.from_numpy(ours)
    for step in schedule.steps:
        eps = rng.standard_normal(SHAPE).astype(dtype)
        ours = solver.step(eps, step.index, ours)
        theirs = scheduler.step(torch.from_numpy(eps), step.t, theirs).prev_sample
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            ours, theirs.numpy(), rtol=0, atol=tolerance * float(theirs.abs().max()), err_msg=f"at {step}"
        )


def gaussian_error(name: str, steps: int) -> float:
    """Relative error half-way down on data N(0, 1/4), whose ODE is solved in closed form.

    There eps(x, t) = σ_t x / v_t with v_t = α_t² / 4 + σ_t², and x_t / sqrt(v_t) is constant along the way. The second
    half is left out: the grid is coarse in λ there, and the last step of first order in every solver.
    """
    schedule = TimestepSchedule.build(NoiseSchedule(), steps, 0.7, 10, name)
    solver = make_solver(schedule)
    abars = np.array([level.alpha**2 for level in schedule.levels()])
    variances = abars / 4 + 1 - abars
    x = np.array([1.0])
    half = len(schedule.steps) // 2
    for step in schedule.steps[:half]:
        x = solver.step((1 - abars[step.index]) ** 0.5 * x / variances[step.index], step.index, x)
    return abs(float(x[0]) / float((variances[half] / variances[0]) ** 0.5) - 1)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp2m", 2), ("unipc", 3)])
def test_solver_converges_at_its_order(name: str, order: int) -> None:
    coarse, fine = gaussian_error(name, 20), gaussian_error(name, 80)
    assert coarse < 0.02
    assert math.log(coarse / fine, 4) > order - 0.1


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_keeps_samples_independent_and_restarts(name: str) -> None:
    rng = np.random.default_rng(1)
    schedule = TimestepSchedule.build(NoiseSchedule(), 8, 0.7, 10, name)
    start, *eps = rng.standard_normal((1 + len(schedule.steps), 3, 4, 2, 2))
    solver = make_solver(schedule)

    def run(rows: slice) -> Any:
        x = start[rows]
        for step in schedule.steps:
            x = solver.step(eps[step.index][rows], step.index, x)
        return x

    whole = run(slice(None))
    assert whole.dtype == np.float64
    for row in range(3):
        np.testing.assert_array_equal(run(slice(row, row + 1))[0], whole[row])


@both_sets
def test_ddim_lsast_steps_match_the_recording(golden: GoldenFiles) -> None:
    recorded = load_file(f"{golden.prefix}_io.safetensors")
    schedule = TimestepSchedule.build(NoiseSchedule(), 50, 0.7, 10, "ddim_lsast")
    solver = make_solver(schedule)
    ends = [*recorded["latents_in"][1:, None], recorded["final_latent"]]
    for index, end in enumerate(ends):
        unconditional, conditional = recorded["eps_uncond"][index], recorded["eps_cond"][index]
        eps = unconditional + 10.0 * (conditional - unconditional)
        found = solver.step(eps[None], index, recorded["latents_in"][index][None])
        np.testing.assert_allclose(found, end, rtol=0, atol=2e-6 * np.abs(end).max())


def test_guide_of_two_rows_matches_the_formula() -> None:
    null, style = np.random.default_rng(0).standard_normal((2, 1, 4, 2, 3)).astype(np.float32)
    exact = null.astype(np.float64) + 7.5 * (style.astype(np.float64) - null)
    found = guide(np.stack([null, style]), 7.5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    tensors = guide((torch.from_numpy(null), torch.from_numpy(style)), 7.5)
    np.testing.assert_allclose(tensors.numpy(), found, rtol=1e-6, atol=1e-6)
    assert guide((style,), 7.5) is style  # one row alone: no guidance
