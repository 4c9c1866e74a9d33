"""The timesteps of a sampling run, and the stage of the prompts that each belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, fault_list
from .noise_schedule import Floats, NoiseLevel, NoiseSchedule
from .solvers import SOLVERS

OFFSET = 1
"""The first timestep of every grid, ``steps_offset`` in diffusers."""


@dataclass(frozen=True)
class Step:
    """One evaluation of the denoiser, and the step of the solver after it."""

    index: int
    """Position in the run, from 0."""
    t: int
    """Timestep of the evaluation."""
    stage: int
    """Stage of the prompts: t * stages // train_steps; stage 0 is next to the clean picture (docs/method.md §1.4)."""


@dataclass(frozen=True)
class TimestepSchedule:
    """The steps of one run, from the noisiest, as in diffusers' image-to-image pipelines.

    The grid is "leading" (Lin et al. 2023, table 2) with offset 1. For DDIM it has `steps` points from t = 1 up. For
    the multistep solvers it has the `steps` points above t = 1 of a grid of steps + 1, because their last step ends at
    the clean latent.

    The solver `ddim_lsast` is DDIM on the grid of LSAST's released code (docs/method.md §4, 3 and 4): T = 1, 1 + c,
    1 + 2c … up to train_steps, with c = train_steps // steps; these may be more than `steps` points. With
    n = int(steps * strength) the latent is noised to T[n], but the first step is at T[n-1].
    """

    noise: NoiseSchedule
    solver: str
    """The solver that the grid is for."""
    steps: tuple[Step, ...]
    """The last int(steps * strength) points of the grid, at least one."""
    start_t: int
    """The timestep to which the latent is noised: that of the first step, with `ddim_lsast` one grid point more."""

    @classmethod
    def build(
        cls, noise: NoiseSchedule, steps: int, strength: float, stages: int, solver: str = "ddim"
    ) -> TimestepSchedule:
        """The schedule of a run.

        Args:
            noise: the base's noise schedule.
            steps: points of the full grid, from pure noise down.
            strength: part of the grid that is run, in (0, 1].
            stages: stages of the prompts.
            solver: one of `solvers.SOLVERS`.

        Raises:
            UsageError: values out of range, all at once. With `ddim_lsast` also values with which the released code
                fails or does not denoise.
        """
        faults: list[str] = []
        entry = SOLVERS.get(solver)
        if entry is None:
            faults.append(f"solver: found {solver!r}; expected one of {', '.join(SOLVERS)}")
        if not 0 < strength <= 1:
            faults.append(f"strength: found {strength}; expected more than 0 and at most 1")
        if stages < 1:
            faults.append(f"stages: found {stages}; expected at least 1")
        released = entry is not None and entry.grid == "released"
        if released:
            grid = _released_grid(noise.train_steps, steps)
            faults += _released_faults(noise.train_steps, grid, steps, strength)
        else:
            to_zero = entry is not None and entry.final_sigma == "zero"
            grid = _leading_grid(noise.train_steps, steps, to_zero=to_zero)
            if not grid or grid[0] >= noise.train_steps:
                largest = noise.train_steps - (2 if to_zero else 1)
                faults.append(f"steps: found {steps}; expected 1 to {largest} with {solver}")
        if faults:
            raise UsageError(fault_list("invalid schedule:", faults))
        run = grid[len(grid) - max(int(steps * strength), 1) :]
        start_t = grid[len(grid) - len(run) - 1] if released else run[0]
        steps_run = tuple(Step(index, t, t * stages // noise.train_steps) for index, t in enumerate(run))
        return cls(noise, solver, steps_run, start_t)

    def levels(self) -> list[NoiseLevel]:
        """The noise level of every step, then that of the end of the run: [len(steps) + 1]."""
        end = NoiseLevel.of(1) if SOLVERS[self.solver].final_sigma == "zero" else self.noise.level(0)
        return [*(self.noise.level(step.t) for step in self.steps), end]

    def add_noise(self, z0: Floats, noise: Floats) -> Floats:
        """The latent where the run starts, z_t at t = `start_t`; any shape, in the type of `z0`."""
        return self.noise.level(self.start_t).add_noise(z0, noise)


def _leading_grid(train_steps: int, steps: int, *, to_zero: bool) -> list[int]:
    """Timesteps from the noisiest down; empty if train_steps has fewer. A run to sigma 0 stops above t = 1."""
    points = steps + to_zero
    if steps < 1 or points > train_steps:
        return []
    stride = train_steps // points
    return [OFFSET + stride * k for k in reversed(range(points))][:steps]


def _released_grid(train_steps: int, steps: int) -> list[int]:
    """The timesteps of the released code's grid from the noisiest down, also where that code then fails."""
    if not 1 <= steps <= train_steps:
        return []
    return [OFFSET + t for t in reversed(range(0, train_steps, train_steps // steps))]


def _released_faults(train_steps: int, grid: list[int], steps: int, strength: float) -> list[str]:
    """The reasons why the released code cannot run `grid`."""
    if not grid:
        return [f"steps: found {steps}; expected 1 to {train_steps} with ddim_lsast"]
    faults = []
    if grid[0] >= train_steps:
        faults.append(
            f"steps: found {steps}; expected another number with ddim_lsast, such as 50: that code's grid would go by "
            f"{train_steps // steps} up to t = {grid[0]}, past its last timestep {train_steps - 1}, and fail"
        )
    run = int(steps * strength) if 0 < strength <= 1 else 1
    if run < 1:
        faults.append(
            f"strength: found {strength} at {steps} steps; expected at least {1 / steps:.3g} with ddim_lsast: "
            "that code would take no step and give back the noised latent"
        )
    if run >= len(grid):
        faults.append(
            f"strength: found {strength} at {steps} steps; expected less with ddim_lsast: that code would noise to "
            f"point {run} of a grid whose last is {len(grid) - 1}, and fail"
        )
    return faults
