"""A solver whose predicted clean latent is blended with a given one: what a mask and a video need."""

from __future__ import annotations

import numpy as np

from lsast_engines.diffusion.solvers import Array, Solver
from lsast_engines.diffusion.timesteps import TimestepSchedule


def predict_x0(schedule: TimestepSchedule, index: int, eps: Array, x: Array) -> Array:
    """The clean latent by the predicted noise, x0 = (x - sigma eps) / alpha at step `index` of the schedule."""
    alpha, sigma = _level(schedule, index)
    return (x - sigma * eps) / alpha


class X0Blend:
    """Wraps a solver and replaces its predicted x0 by x0 + w · (target - x0); ε is adjusted to match.

    Where w is 1 every solver stays on z_t = sqrt(abar) target + sqrt(1 - abar) noise, the target noised, which is what
    RePaint (Lugmayr et al. 2022, eq. 8) puts there. See `lsast_engines.diffusion.solvers` for the letters.
    """

    def __init__(self, solver: Solver, schedule: TimestepSchedule, target: Array, weight: Array) -> None:
        """Wrap `solver`, which takes the steps of `schedule`: target [4, h, w], weight w [h, w] of 0 … 1."""
        self._solver = solver
        self._schedule = schedule
        self._target = target
        self.weight = weight
        self.x0 = target
        """What the last step took the clean latent to be, for previews: [4, h, w]."""

    def step(self, eps: Array, index: int, x: Array) -> Array:
        """See `Solver.step`."""
        alpha, sigma = _level(self._schedule, index)
        x0 = predict_x0(self._schedule, index, eps, x)
        self.x0 = x0 + self.weight * (self._target - x0)
        after = self._solver.step(eps - alpha / sigma * self.weight * (self._target - x0), index, x)
        if isinstance(self._solver, X0Blend):
            self.x0 = self._solver.x0
        return after


def _level(schedule: TimestepSchedule, index: int) -> tuple[np.float32, np.float32]:
    """Alpha and sigma at step `index`."""
    abar = schedule.abars()[index]
    return np.float32(abar**0.5), np.float32((1 - abar) ** 0.5)
