"""The plan of a run: which graphs run at which step."""

from __future__ import annotations

from typing import Any

import pytest

from lsast import Options
from lsast.sampling.step_plan import Pass, graphs_of, lay_passes

PLAIN: dict[str, Any] = {
    "style": "monet", "steps": 10, "strength": 1.0, "guidance": 3.0, "control": 1.0, "size": 512, "solver": "ddim",
}  # fmt: skip


def plan(interval: int, count: int = 10) -> tuple[Pass, ...]:
    return lay_passes(Options(**PLAIN, cache_interval=interval), count)


@pytest.mark.parametrize(
    ("interval", "expected"), [(1, "wwwwwwwwww"), (2, "dsdsdsdsds"), (3, "dssdssdssd"), (20, "dsssssssss")]
)
def test_lay_passes_computes_the_whole_unet_at_every_nth_step(interval: int, expected: str) -> None:
    assert "".join(each[0] for each in plan(interval)) == expected


def test_graphs_of_a_plan_are_those_that_run() -> None:
    assert graphs_of(plan(1)) == ("denoiser",)
    assert graphs_of(plan(2)) == ("controlnet", "unet_full", "unet_outer")
    assert graphs_of(plan(2, count=1)) == ("controlnet", "unet_full")
