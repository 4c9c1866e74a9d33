from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import schedulers
from lsast_engines.diffusion import SOLVERS, NoiseSchedule, TimestepSchedule, guide, make_solver
from lsast_engines.errors import UsageError

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
def test_noise_and_solver_steps_match_diffusers(name, steps, strength, dtype):
    rng = np.random.default_rng(steps)
    schedule = TimestepSchedule.build(NoiseSchedule(), steps, strength, 10, name)
    solver = make_solver(schedule)
    scheduler = started(name, steps, len(schedule.steps))
    if dtype is np.float64:
        sharpen(scheduler)
    # diffusers' DPM-Solver++ rounds the latent to float32 in either case. Of the largest value, because noise at random
    # instead of predicted makes latents grow far over 1.
    tolerance = 1e-5 if dtype is np.float32 else 1e-6 if name == "dpmpp2m" else 1e-9

    def compare(place: Any) -> None:
        assert ours.dtype == dtype
        limit = tolerance * float(theirs.abs().max())
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=limit, err_msg=f"at {place}")

    z0, noise = rng.standard_normal((2, *SHAPE)).astype(dtype)
    ours = schedule.add_noise(z0, noise)
    start = torch.tensor([schedule.start_t] * len(z0))
    theirs = scheduler.add_noise(torch.from_numpy(z0), torch.from_numpy(noise), start)
    compare("the start")
    for step in schedule.steps:
        eps = rng.standard_normal(SHAPE).astype(dtype)
        ours = solver.step(eps, step.index, ours)
        theirs = scheduler.step(torch.from_numpy(eps), step.t, theirs).prev_sample
        compare(step)


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_keeps_samples_independent_and_restarts(name):
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


def test_guide_of_two_rows_matches_the_formula():
    null, style = np.random.default_rng(0).standard_normal((2, 1, 4, 2, 3)).astype(np.float32)
    exact = null.astype(np.float64) + 7.5 * (style.astype(np.float64) - null)
    found = guide(np.stack([null, style]), 7.5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    tensors = guide((torch.from_numpy(null), torch.from_numpy(style)), 7.5)
    np.testing.assert_allclose(tensors.numpy(), found, rtol=1e-6, atol=1e-6)
    assert guide((style,), 7.5) is style  # one row alone: no guidance


@pytest.mark.parametrize(
    "spec", [NoiseSchedule(), NoiseSchedule(beta_schedule="linear"), NoiseSchedule(400, 1e-4, 0.02, "linear")], ids=str
)
def test_alphas_cumprod_matches_diffusers(spec):
    scheduler = DDIMScheduler(spec.train_steps, spec.beta_start, spec.beta_end, beta_schedule=spec.beta_schedule)
    abars = spec.alphas_cumprod
    assert abars.dtype == np.float64
    # diffusers multiplies in float32.
    np.testing.assert_allclose(abars, scheduler.alphas_cumprod.numpy(), rtol=2e-5)


def test_noise_schedule_lists_all_faults():
    with pytest.raises(UsageError, match=r"(?s)train_steps.*0\.5 to 0\.1.*'cosine'.*scaled_linear, linear"):
        NoiseSchedule(0, 0.5, 0.1, "cosine")  # type: ignore[arg-type]


def img2img_timesteps(solver: str, steps: int, strength: float) -> list[int]:
    """As StableDiffusionImg2ImgPipeline.get_timesteps, which cannot be imported without transformers."""
    scheduler = schedulers.scheduler(solver)
    scheduler.set_timesteps(steps)
    init_timestep = min(int(steps * strength), steps)
    t_start = max(steps - init_timestep, 0)
    return list(scheduler.timesteps[t_start * scheduler.order :].tolist())


@pytest.mark.parametrize("solver", schedulers.SOLVERS)
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.7, 0.99, 1.0])
def test_timesteps_match_diffusers_img2img_up_to_most_steps(solver, strength):
    largest = 999 if solver == "ddim" else 998
    for steps in (4, 7, 12, 30, 50, 100, 334, 499, largest):
        schedule = TimestepSchedule.build(NoiseSchedule(), steps, strength, 10, solver)
        expected = img2img_timesteps(solver, steps, strength)
        assert [step.t for step in schedule.steps] == expected
        assert [step.index for step in schedule.steps] == list(range(len(expected)))
        assert [step.stage for step in schedule.steps] == [t // 100 for t in expected]  # docs/method.md §1.4
        assert schedule.start_t == expected[0]
        assert len(set(expected)) == len(expected)
    with pytest.raises(UsageError, match=rf"found {largest + 1}; expected 1 to {largest}"):
        TimestepSchedule.build(NoiseSchedule(), largest + 1, strength, 10, solver)


def test_schedule_lists_all_faults():
    message = "(?s)'euler'.*ddim, dpmpp2m, unipc, ddim_lsast.*nan.*stages.*found 0;"
    with pytest.raises(UsageError, match=message):
        TimestepSchedule.build(NoiseSchedule(), 0, float("nan"), 0, "euler")


def released_run(steps: int, strength: float) -> tuple[int, list[int]]:
    """Timestep of the start noise and those of the steps, as the DDIM sampler of CompVis's latent-diffusion has them.

    Written after docs/method.md §4.3-4; raises IndexError where that code does.
    """
    grid = np.arange(0, 1000, 1000 // steps) + 1
    np.zeros(1000)[grid]  # looks up abar at every point of the grid, used or not
    count = int(strength * steps)
    return int(grid[count]), [int(t) for t in np.flip(grid[:count])]


def test_ddim_lsast_grid_matches_the_released_code():
    ran = failed = 0
    # Every spacing of the grid, where it changes, and of the widest ranges of one spacing a part.
    for steps in sorted({*range(1, 170), *range(170, 1001, 9), 200, 201, 250, 251, 333, 334, 499, 500, 501, 999, 1000}):
        for strength in (0.001, 0.3, 0.7, 0.98, 1.0):
            try:
                start, timesteps = released_run(steps, strength)
            except IndexError:
                start, timesteps = -1, []
            if not timesteps:
                failed += 1
                words = "that code('s grid would go by| would take no step| would noise to point)"
                with pytest.raises(UsageError, match=rf"found ({steps}|{strength} at {steps} steps); .* {words}"):
                    TimestepSchedule.build(NoiseSchedule(), steps, strength, 10, "ddim_lsast")
                continue
            ran += 1
            schedule = TimestepSchedule.build(NoiseSchedule(), steps, strength, 10, "ddim_lsast")
            assert (schedule.start_t, [step.t for step in schedule.steps]) == (start, timesteps), (steps, strength)
            assert all(step.stage == step.t // 100 for step in schedule.steps)
    assert ran > 500
    assert failed > 400
    with pytest.raises(UsageError, match="expected 1 to 1000 with ddim_lsast"):
        TimestepSchedule.build(NoiseSchedule(), 1001, 0.7, 10, "ddim_lsast")
