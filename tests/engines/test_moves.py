"""A run as matrices against the solver itself, and the graph that applies them against plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from fake_denoiser import advance_kernel
from lsast_engines.loop import ADVANCE_GRAPH
from lsast_engines.moves import SLOTS, halves, moves
from lsast_engines.noise import NoiseSpec
from lsast_engines.schedule import Schedule
from lsast_engines.solvers import SOLVERS, LinearSolver, make_solver


def run_of(name: str, steps: int, strength: float) -> tuple[Any, Schedule]:
    schedule = Schedule.build(NoiseSpec(), steps, strength, 10, name)
    return make_solver(name, NoiseSpec(), schedule), schedule


RUNS = [(1, 1.0), (2, 1.0), (10, 0.9), (50, 0.7)]
# The released code has no run of the whole schedule.
CASES = [(name, *run) for name in sorted(SOLVERS) for run in RUNS if name != "released" or run[1] < 1]


@pytest.mark.parametrize(("name", "steps", "strength"), CASES)
def test_the_matrices_take_the_solvers_steps(name: str, steps: int, strength: float) -> None:
    solver, schedule = run_of(name, steps, strength)
    assert isinstance(solver, LinearSolver)
    table = moves(solver, schedule.abars()).astype(np.float64)
    again, _ = run_of(name, steps, strength)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 5))
    state = np.zeros((SLOTS, *x.shape))
    state[0] = x
    for index in range(len(schedule.steps)):
        eps = rng.standard_normal(x.shape)
        abar = schedule.abars()[index]
        clean = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        x = again.step(eps, index, x)
        advanced = np.einsum("ij,j...->i...", table[index], np.concatenate([state, eps[None]]))
        state = advanced[:SLOTS]
        # The table is of float32.
        np.testing.assert_allclose(state[0], x, rtol=0, atol=2e-6 * np.abs(x).max(), err_msg=f"{name} at {index}")
        np.testing.assert_allclose(advanced[-1], clean, rtol=0, atol=2e-6 * np.abs(clean).max())


def test_a_used_solver_makes_the_same_table() -> None:
    for name in ("ddim", "dpmpp2m", "unipc"):
        solver, schedule = run_of(name, 6, 1.0)
        first = moves(solver, schedule.abars())
        np.testing.assert_array_equal(moves(solver, schedule.abars()), first)


def test_the_graph_is_guidance_and_a_product_of_matrices() -> None:
    onnx.checker.check_model(str(ADVANCE_GRAPH), full_check=True)
    kernel = advance_kernel()
    rng = np.random.default_rng(1)
    for guidance, batch in (([7.0, 1.5], 2), ([1.0], 1), ([0.0, 1.0, 3.0], 3)):
        weights = halves(guidance)
        eps = rng.standard_normal((len(weights), batch, 4, 6, 2), dtype=np.float32)
        state = rng.standard_normal((SLOTS, batch, 4, 6, 2), dtype=np.float32)
        matrices = rng.standard_normal((SLOTS + 1, SLOTS + 1, batch), dtype=np.float32)
        found = kernel.run({"eps": eps, "halves": weights, "state": state, "moves": matrices})["advanced"]
        noise = eps[0]
        if len(eps) == 2:
            noise = eps[0] + np.array(guidance)[:, None, None, None] * (eps[1] - eps[0])
        expected = np.einsum("ijb,jbchw->ibchw", matrices.astype(float), np.concatenate([state, noise[None]]))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_graph_on_disk_is_what_the_exporter_writes() -> None:
    advance = pytest.importorskip("lsast_export.advance")
    assert onnx.load(ADVANCE_GRAPH) == advance.advance_model()
