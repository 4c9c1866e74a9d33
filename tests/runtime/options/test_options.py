from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lsast import Options, UsageError
from lsast.options.presets import preset_options

GOOD: dict[str, Any] = {
    "style": "monet",
    "steps": 20,
    "strength": 0.7,
    "guidance": 3.0,
    "control": 1.0,
    "size": 512,
    "solver": "ddim",
    "seed": 0,
    "alpha": "keep",
    "fit": "aspect",
    "keep_colour": False,
    "feather": 16,
    "tile": 1024,
    "cache_interval": 1,
    "decoder": "full",
    "preset": None,
}

LIMITS = [
    {"steps": 1},
    {"steps": 1000},
    {"strength": 1},
    {"strength": 1e-6},
    {"guidance": 0},
    {"guidance": 100.0},
    {"control": 0},
    {"control": 2},
    {"size": 0},
    {"size": 64},
    {"size": 8192},
    {"seed": 2**80},
    {"solver": "unipc"},
    {"solver": "dpmpp2m"},
    {"solver": "released"},
    {"alpha": "composite"},
    {"fit": "squash"},
    {"keep_colour": True},
    {"feather": 0},
    {"feather": 4096},
    {"style": "vangogh:0.6@up+monet@0-4"},
    {"tile": 0},
    {"tile": 64},
    {"tile": 8192},
    {"cache_interval": 1000},
    {"decoder": "small"},
]

FAULTS = [
    ("style", ""),
    ("style", None),
    ("steps", 0),
    ("steps", 1001),
    ("steps", 10.0),
    ("steps", True),
    ("strength", 0),
    ("strength", 1.01),
    ("strength", float("nan")),
    ("strength", "0.7"),
    ("guidance", -0.1),
    ("guidance", float("inf")),
    ("guidance", "2"),
    ("control", -1),
    ("control", 2.5),
    ("size", 63),
    ("size", -64),
    ("size", 9000),
    ("size", False),
    ("solver", "euler"),
    ("solver", ["ddim"]),
    ("seed", -1),
    ("seed", 0.5),
    ("alpha", "drop"),
    ("fit", "crop"),
    ("keep_colour", 1),
    ("feather", -1),
    ("feather", 4097),
    ("tile", 63),
    ("tile", -1),
    ("tile", 0.5),
    ("cache_interval", 1.5),
    ("cache_interval", 0),
    ("cache_interval", "2"),
    ("decoder", "tiny"),
    ("decoder", True),
    ("preset", "sdxl"),
    ("preset", ""),
]


@pytest.mark.parametrize("change", LIMITS, ids=str)
def test_limits_are_legal(change: dict[str, Any]) -> None:
    options = Options(**{**GOOD, **change})
    assert dataclasses.asdict(options) == {**GOOD, **change}


@pytest.mark.parametrize(("name", "value"), FAULTS)
def test_a_fault_is_named_with_what_was_found(name: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        Options(**{**GOOD, name: value})
    _, line = str(caught.value).split("\n")
    assert line.startswith(f"  - {name}: found {value!r}; expected ")


def test_all_faults_are_named_at_once() -> None:
    wrong = dict(FAULTS)
    assert wrong.keys() == GOOD.keys()
    with pytest.raises(UsageError) as caught:
        Options(**wrong)
    assert [line.split(":")[0] for line in str(caught.value).split("\n")[1:]] == [f"  - {name}" for name in GOOD]


def test_what_is_not_given_is_the_bundles_default() -> None:
    own = ("seed", "alpha", "fit", "keep_colour", "feather", "tile")
    defaults = {name: value for name, value in GOOD.items() if name not in own}
    options = Options.resolve({"style": "vangogh", "strength": None, "guidance": 0.0, "seed": None}, defaults)
    assert dataclasses.asdict(options) == {**GOOD, "style": "vangogh", "guidance": 0.0}


def test_options_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options(**GOOD).seed = 1  # type: ignore[misc]


def test_squashing_needs_a_side_to_squash_to() -> None:
    with pytest.raises(UsageError, match=r"size: found 0 with fit squash; expected .* such as 512"):
        Options(**{**GOOD, "size": 0, "fit": "squash"})
    Options(**{**GOOD, "size": 0, "fit": "aspect"})


def test_the_released_preset_is_the_shipped_call() -> None:
    # docs/method.md §4: 50 DDIM steps, strength 0.7, scale 10, all ControlNet scales 1, squashed to 512 x 512.
    options = Options(style="monet", **preset_options("released"))
    shipped = {"steps": 50, "strength": 0.7, "guidance": 10.0, "control": 1.0, "size": 512, "fit": "squash"}
    assert dataclasses.asdict(options) == {**GOOD, **shipped, "solver": "released"}
    assert preset_options(None) == {}
    with pytest.raises(UsageError, match="found preset 'sdxl'; expected one of exact, balanced, fast, released"):
        preset_options("sdxl")


def test_a_fault_in_a_mix_is_pointed_at() -> None:
    with pytest.raises(UsageError) as caught:
        Options(**{**GOOD, "style": "vangogh:x+monet", "steps": 0})
    lines = str(caught.value).split("\n")
    assert lines[1].startswith("  - style: found ")
    assert lines[2].index("vangogh:x+monet") + len("vangogh:") == lines[3].index("^")
    assert sum(line.startswith("  - ") for line in lines) == 2


def test_options_refuse_strength_by_stage_and_say_what_to_do_instead() -> None:
    with pytest.raises(
        UsageError, match=r"expected a number .*strength by stage was removed, use a mask or one number"
    ):
        Options(**{**GOOD, "strength": "0.7,0.4@0-2"})


def test_resolve_refuses_removed_options_by_name_all_at_once() -> None:
    given = {"control_low": 300, "control_interval": 2, "guidance_low": 1, "guidance_high": 700}
    with pytest.raises(UsageError) as caught:
        Options.resolve(given, GOOD)
    assert [line.split(":")[0] for line in str(caught.value).split("\n")[1:]] == [
        f"  - {name} was removed" for name in given
    ]


def test_resolve_reads_removed_options_at_the_values_that_changed_nothing() -> None:
    given = {"control_low": 0, "control_interval": 1, "guidance_low": None, "guidance_high": 1000, "steps": 7}
    assert Options.resolve(given, GOOD) == Options(**{**GOOD, "steps": 7})
