"""A solver's run as a table of numbers: what a device needs to take its steps without knowing the solver.

A step is linear in the latent x, in what the solver keeps of earlier steps, and in the noise ε. So it is a matrix,
which is found by taking the step on the unit vectors of these: five numbers stand for each of five latents. The solvers
stay the one place where their formulas are (`solvers`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .solvers import LinearSolver
from .spec import KEPT

SLOTS = 1 + KEPT
"""Latents of the state: x and what is kept."""


def moves(solver: LinearSolver, abars: Sequence[float]) -> npt.NDArray[np.float32]:
    """The matrices of a whole run.

    Args:
        solver: at its first step; its run is used up.
        abars: of every step and of the end, as `Schedule.abars`.

    Returns:
        [steps, SLOTS + 1, SLOTS + 1]. Rows: x and what is kept after the step, and the data prediction
        (x - σ ε) / α before it. Columns: x and what is kept before the step, and ε.
    """
    unit = np.eye(SLOTS + 1)
    table = np.zeros((len(abars) - 1, SLOTS + 1, SLOTS + 1))
    for index, abar in enumerate(abars[:-1]):
        # After the first step there are as many as that step left, and so on.
        solver.memory = list(unit[1 : 1 + len(solver.memory)])
        table[index, 0] = solver.step(unit[-1], index, unit[0])
        kept = solver.memory
        assert len(kept) <= KEPT, "a solver keeps no more than there is room for"
        for slot, latent in enumerate(kept, start=1):
            table[index, slot] = latent
        table[index, -1] = (unit[0] - (1 - abar) ** 0.5 * unit[-1]) / abar**0.5
    return table.astype(np.float32)


def halves(guidance: Sequence[float]) -> npt.NDArray[np.float32]:
    """The weights of the rows of ε under guidance g, 1 - g and g: [2, B]; [1, B] of ones if there is none."""
    if all(g == 1 for g in guidance):
        return np.ones((1, len(guidance)), np.float32)
    return np.array([[1 - g for g in guidance], list(guidance)], np.float32)
