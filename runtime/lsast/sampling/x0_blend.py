"""A solver whose predicted clean latent is blended with a given one: what a mask and a video need."""

from __future__ import annotations

from lsast_engines.diffusion import Array, Solver, TimestepSchedule


class X0Blend:
    """Wraps a solver and replaces its predicted x0 by x0 + w · (target - x0); ε is adjusted to match. Where w is 1
    every solver stays on the target noised, sqrt(abar) target + sqrt(1 - abar) noise, as RePaint does (Lugmayr et
    al. 2022, eq. 8). See `lsast_engines.diffusion` for the letters."""

    def __init__(self, solver: Solver, schedule: TimestepSchedule, target: Array, weight: Array) -> None:
        """Wrap `solver`, which takes the steps of `schedule`: target [4, h, w], weight w [h, w] of 0 … 1."""
        self._solver = solver
        self._levels = schedule.levels()
        self._target = target
        self.weight = weight
        self.x0 = target
        """The blended x0 of the last step, for previews: [4, h, w]."""

    def step(self, eps: Array, index: int, x: Array) -> Array:
        """See `Solver.step`."""
        level = self._levels[index]
        x0 = level.x0(x, eps)
        self.x0 = x0 + self.weight * (self._target - x0)
        after = self._solver.step(eps - level.alpha / level.sigma * self.weight * (self._target - x0), index, x)
        if isinstance(self._solver, X0Blend):
            self.x0 = self._solver.x0
        return after
