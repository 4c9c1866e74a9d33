"""The timesteps of a sampling run, and the stage of the prompts that each belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, fault_list
from .noise_schedule import NoiseSchedule

OFFSET = 1
"""The first timestep of every grid, ``steps_offset`` in diffusers."""

FINAL_SIGMA_NONZERO = {"ddim": True, "dpmpp2m": False, "unipc": False, "ddim_lsast": True}
"""By solver, whether the last step ends at the noise level of t = 0, or at no noise."""

Floats = TypeVar("Floats", npt.NDArray[np.float32], npt.NDArray[np.float64])


@dataclass(frozen=True)
class Step:
    """One evaluation of the denoiser, and the step of the solver after it."""

    index: int
    """Position in the run, from 0."""
    t: int
    """Timestep of the evaluation."""
    t_prev: int
    """Timestep at which the solver's step ends, less than `t`; -1 after the last step."""
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
        if solver not in FINAL_SIGMA_NONZERO:
            faults.append(f"solver: found {solver!r}; expected one of {', '.join(FINAL_SIGMA_NONZERO)}")
        if not 0 < strength <= 1:
            faults.append(f"strength: found {strength}; expected more than 0 and at most 1")
        if stages < 1:
            faults.append(f"stages: found {stages}; expected at least 1")
        if solver == "ddim_lsast":
            grid = _released_grid(noise.train_steps, steps)
            faults += _released_faults(noise.train_steps, grid, steps, strength)
        else:
            grid = _grid(noise.train_steps, steps, open_end=not FINAL_SIGMA_NONZERO.get(solver, True))
            if not grid or grid[0] >= noise.train_steps:
                largest = noise.train_steps - (1 if FINAL_SIGMA_NONZERO.get(solver, True) else 2)
                faults.append(f"steps: found {steps}; expected 1 to {largest} with {solver}")
        if faults:
            raise UsageError(fault_list("invalid schedule:", faults))
        run = grid[len(grid) - max(int(steps * strength), 1) :]
        start_t = grid[len(grid) - len(run) - 1] if solver == "ddim_lsast" else run[0]
        return cls(
            noise,
            solver,
            tuple(
                Step(index, t, t_prev, t * stages // noise.train_steps)
                for index, (t, t_prev) in enumerate(zip(run, [*run[1:], -1], strict=True))
            ),
            start_t,
        )

    def abars(self) -> list[float]:
        """abar at the timestep of every step, then at the end of the run: [len(steps) + 1]."""
        abars = self.noise.alphas_cumprod
        return [float(abars[step.t]) for step in self.steps] + [
            float(abars[0]) if FINAL_SIGMA_NONZERO[self.solver] else 1.0
        ]

    def add_noise(self, z0: Floats, noise: Floats, t: int) -> Floats:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, any shape, in the type of `z0`."""
        abar = float(self.noise.alphas_cumprod[t])
        noisy: Floats = abar**0.5 * z0 + (1 - abar) ** 0.5 * noise
        return noisy


def _grid(train_steps: int, steps: int, *, open_end: bool) -> list[int]:
    """Timesteps from the noisiest down; empty if train_steps has fewer."""
    points = steps + open_end
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
