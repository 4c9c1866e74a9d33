"""The plan of a run: what is left out at which step."""

from __future__ import annotations

from typing import Any

import pytest

from lsast import Options, UsageError
from lsast.passes import Pass, graphs_of, lay_passes, levers_of
from lsast_engines.noise import NoiseSpec
from lsast_engines.schedule import Schedule

PLAIN: dict[str, Any] = {
    "style": "monet", "steps": 10, "strength": 1.0, "guidance": 3.0, "control": 1.0, "size": 512, "solver": "ddim",
}  # fmt: skip

LETTERS = {"inside": "i", "fresh": "f", "kept": "k", "off": "-"}


def plan(**options: Any) -> tuple[Pass, ...]:
    """The plan of ten steps at t = 901, 801 … 1."""
    chosen = Options(**{**PLAIN, **options})
    schedule = Schedule.build(NoiseSpec(), chosen.steps, float(chosen.strength), 10, chosen.solver)
    return lay_passes(chosen, schedule.steps)


def told(passes: tuple[Pass, ...]) -> list[str]:
    """Guidance, ControlNet and U-Net, a letter for each step."""
    return [
        "".join("g" if each.guided else "." for each in passes),
        "".join(LETTERS[each.control] for each in passes),
        "".join(each.unet[0] for each in passes),
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["gggggggggg", "iiiiiiiiii", "wwwwwwwwww"]),
        ({"guidance": 1.0, "guidance_low": 500}, ["..........", "iiiiiiiiii", "wwwwwwwwww"]),
        # t = 901 801 701 601 501 401 301 201 101 1
        ({"guidance_low": 301}, ["ggggggg...", "iiiiiiiiii", "wwwwwwwwww"]),
        ({"guidance_low": 302, "guidance_high": 700}, ["...ggg....", "iiiiiiiiii", "wwwwwwwwww"]),
        ({"control_low": 400}, ["gggggggggg", "ffffff----", "dddddddddd"]),
        ({"control_low": 1000}, ["gggggggggg", "----------", "dddddddddd"]),
        ({"control_interval": 3}, ["gggggggggg", "fkkfkkfkkf", "dddddddddd"]),
        ({"cache_interval": 3}, ["gggggggggg", "fkkfkkfkkf", "dssdssdssd"]),
        ({"cache_interval": 2, "control_interval": 3}, ["gggggggggg", "fkkkfkkkfk", "dsdsdsdsds"]),
        ({"cache_interval": 4, "guidance_low": 500}, ["ggggg.....", "fkkkfkkkfk", "dsssdsssds"]),
        # a feature of one half does for no step of two: where guidance begins, all is computed
        ({"cache_interval": 4, "guidance_high": 750}, ["..gggggggg", "fkfkkkfkkk", "dsdsssdsss"]),
        ({"cache_interval": 2, "control_low": 300}, ["gggggggggg", "fkfkfkf---", "dsdsdsdsds"]),
    ],
    ids=str,
)
def test_each_lever_leaves_out_what_it_says(options: dict[str, Any], expected: list[str]) -> None:
    assert told(plan(**options)) == expected


def test_graphs_are_those_that_run() -> None:
    assert graphs_of(plan()) == ("denoiser",)
    assert graphs_of(plan(guidance_low=400)) == ("denoiser",)
    assert graphs_of(plan(control_interval=2)) == ("control", "deep")
    assert graphs_of(plan(control_low=1000)) == ("deep",)
    assert graphs_of(plan(cache_interval=2)) == ("control", "deep", "shallow")
    assert graphs_of(plan(cache_interval=2, steps=1)) == ("control", "deep")


def test_levers_that_need_the_parts_are_named() -> None:
    assert levers_of(Options(**PLAIN, guidance_low=3)) == []
    assert levers_of(Options(**PLAIN, control_low=3, cache_interval=2)) == ["control_low", "cache_interval"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_low": 600, "guidance_high": 400}, "guidance_low: found 600; expected at most guidance_high, 400"),
        ({"control_interval": 0}, "control_interval: found 0; expected a whole number from 1 to 1000"),
        ({"cache_interval": 1.5}, "cache_interval: found 1.5"),
        ({"control_low": 1001}, "control_low: found 1001; expected a whole number from 0 to 1000"),
        ({"guidance_high": -1}, "guidance_high: found -1"),
    ],
)
def test_levers_that_cannot_be_meant(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Options(**{**PLAIN, **options})
