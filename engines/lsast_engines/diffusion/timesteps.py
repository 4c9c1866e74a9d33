"""Which timesteps a sampling run visits, and which stage of the prompt space serves each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, fault_list
from .noise_schedule import NoiseSchedule

OFFSET = 1
"""The first timestep of every grid: Stable Diffusion's ``steps_offset``."""

ENDS_INSIDE = {"ddim": True, "dpmpp2m": False, "unipc": False, "released": True}
"""Whether a solver's last step ends at the noise level of t = 0 (True) or at none at all; by solver."""

Floats = TypeVar("Floats", npt.NDArray[np.float32], npt.NDArray[np.float64])


@dataclass(frozen=True)
class Step:
    """One evaluation of the denoiser."""

    index: int
    """Position in the run, from 0."""
    t: int
    """Timestep that the denoiser is asked at."""
    t_prev: int
    """Timestep that the solver goes to, less than `t`; -1 for the end."""
    stage: int
    """Row of the style: t * stages // train_steps, 0 next to the clean picture."""


@dataclass(frozen=True)
class TimestepSchedule:
    """The steps of one run, noisiest first, as diffusers' image-to-image pipelines take them.

    The grid is "leading" (Lin et al. 2023, table 2) with offset 1. DDIM's has `steps` points from t = 1 up; the
    multistep solvers' has the `steps` points above t = 1 of a grid of steps + 1, because they go from the last
    point straight to the clean latent.

    The solver `released` is DDIM on the grid of LSAST's released code (docs/method.md §4.3-4): T = 1, 1 + c, 1 + 2c …
    with
    c = train_steps // steps, up to train_steps, which may be more than `steps` points. With n = int(steps * strength)
    it noises to T[n], but takes the first step at T[n-1].
    """

    noise: NoiseSchedule
    solver: str
    """The solver whose grid this is."""
    steps: tuple[Step, ...]
    """Those that are run: the last int(steps * strength) of the grid, at least one."""
    start_t: int
    """The timestep whose noise the run starts from: that of the first step, but with `released` one grid point more."""

    @classmethod
    def build(
        cls, noise: NoiseSchedule, steps: int, strength: float, stages: int, solver: str = "ddim"
    ) -> TimestepSchedule:
        """Lay out a run.

        Args:
            noise: the base's noise.
            steps: points of the full grid, from pure noise down.
            strength: share of the grid that is run, in (0, 1].
            stages: stages of the prompt space.
            solver: one of `solvers.SOLVERS`.

        Raises:
            UsageError: values out of range, all at once; the largest `steps` is where the grid leaves no timestep out.
                With `released` also values at which the released code fails or does not denoise.
        """
        faults: list[str] = []
        if solver not in ENDS_INSIDE:
            faults.append(f"solver: found {solver!r}; expected one of {', '.join(ENDS_INSIDE)}")
        if not 0 < strength <= 1:
            faults.append(f"strength: found {strength}; expected more than 0 and at most 1")
        if stages < 1:
            faults.append(f"stages: found {stages}; expected at least 1")
        if solver == "released":
            grid = _released_grid(noise.train_steps, steps)
            faults += _released_faults(noise.train_steps, grid, steps, strength)
        else:
            grid = _grid(noise.train_steps, steps, open_end=not ENDS_INSIDE.get(solver, True))
            if not grid or grid[0] >= noise.train_steps:
                largest = noise.train_steps - (1 if ENDS_INSIDE.get(solver, True) else 2)
                faults.append(f"steps: found {steps}; expected 1 to {largest} with {solver}")
        if faults:
            raise UsageError(fault_list("this schedule cannot be laid out:", faults))
        run = grid[len(grid) - max(int(steps * strength), 1) :]
        start_t = grid[len(grid) - len(run) - 1] if solver == "released" else run[0]
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
        """abar at the timestep of every step and, last, at the end of the run: [len(steps) + 1]."""
        abars = self.noise.alphas_cumprod()
        return [float(abars[step.t]) for step in self.steps] + [float(abars[0]) if ENDS_INSIDE[self.solver] else 1.0]

    def add_noise(self, z0: Floats, noise: Floats, t: int) -> Floats:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, any shape, in the type of `z0`."""
        abar = float(self.noise.alphas_cumprod()[t])
        noisy: Floats = abar**0.5 * z0 + (1 - abar) ** 0.5 * noise
        return noisy


def _grid(train_steps: int, steps: int, *, open_end: bool) -> list[int]:
    """Timesteps from the noisiest down; empty if there are not so many."""
    points = steps + open_end
    if steps < 1 or points > train_steps:
        return []
    stride = train_steps // points
    return [OFFSET + stride * k for k in reversed(range(points))][:steps]


def _released_grid(train_steps: int, steps: int) -> list[int]:
    """The released code's timesteps from the noisiest down, whether it can use them or not; empty if it has none."""
    if not 1 <= steps <= train_steps:
        return []
    return [OFFSET + t for t in reversed(range(0, train_steps, train_steps // steps))]


def _released_faults(train_steps: int, grid: list[int], steps: int, strength: float) -> list[str]:
    """What keeps the released code from running `grid`, and what it would do."""
    if not grid:
        return [f"steps: found {steps}; expected 1 to {train_steps} with released"]
    faults = []
    if grid[0] >= train_steps:
        faults.append(
            f"steps: found {steps}; expected another number with released, such as 50: that code's grid would go by "
            f"{train_steps // steps} up to t = {grid[0]}, past its last timestep {train_steps - 1}, and fail"
        )
    run = int(steps * strength) if 0 < strength <= 1 else 1
    if run < 1:
        faults.append(
            f"strength: found {strength} at {steps} steps; expected at least {1 / steps:.3g} with released: that code "
            "would take no step and give back the noised latent"
        )
    if run >= len(grid):
        faults.append(
            f"strength: found {strength} at {steps} steps; expected less with released: that code would noise to "
            f"point {run} of a grid whose last is {len(grid) - 1}, and fail"
        )
    return faults
