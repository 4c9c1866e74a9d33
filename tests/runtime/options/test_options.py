import dataclasses
import inspect
import json
import typing
from enum import Enum
from fractions import Fraction
from typing import Any, get_args

import click
import numpy as np
import pytest

import lsast.stylizer
from lsast import Options, Stylizer, UsageError
from lsast.cli.main import main
from lsast.options.options import PRESETS, PresetName, SolverName, preset_options, rules
from lsast_engines.diffusion import SOLVERS

GOOD: dict[str, Any] = {
    "style": "monet",
    "steps": 20,
    "strength": 0.7,
    "guidance": 3.0,
    "control_scale": 1.0,
    "size": 512,
    "solver": "ddim",
    "seed": 0,
    "alpha": "keep",
    "fit": "aspect",
    "palette": 0.0,
    "keep_colour": False,
    "feather": 16,
    "tile": 1024,
    "cache_interval": 1,
    "decoder": "full",
    "preset": None,
}

LIMITS: dict[str, list[Any]] = {
    "steps": [1, 1000],
    "strength": [1, 1e-6],
    "guidance": [0, 100.0],
    "control_scale": [0, 2],
    "size": [0, 64, 8192],
    "seed": [2**80],
    "solver": ["unipc", "dpmpp2m", "ddim_lsast"],
    "alpha": ["composite"],
    "fit": ["stretch"],
    "palette": [1],
    "keep_colour": [True],
    "feather": [0, 4096],
    "style": ["vangogh:0.6@up+monet@0-4"],
    "tile": [0, 64, 8192],
    "cache_interval": [1000],
    "decoder": ["small"],
}

FAULTS: dict[str, list[Any]] = {
    "style": ["", None],
    "steps": [0, 1001, 10.0, True],
    "strength": [0, 1.01, float("nan"), "0.7"],
    "guidance": [-0.1, float("inf"), "2"],
    "control_scale": [-1, 2.5],
    "size": [63, -64, 9000, False],
    "solver": ["euler", ["ddim"]],
    "seed": [-1, 0.5, float("inf")],
    "alpha": ["drop"],
    "fit": ["crop"],
    "palette": [1.1],
    "keep_colour": [1],
    "feather": [-1, 4097],
    "tile": [63, -1, 0.5],
    "cache_interval": [1.5, 0, "2"],
    "decoder": ["tiny", True],
    "preset": ["sdxl", ""],
}


def _each(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), _each(LIMITS))
def test_options_at_their_limits_are_valid(name, value):
    assert dataclasses.asdict(Options(**{**GOOD, name: value})) == {**GOOD, name: value}


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("seed", np.int64(7), 7),
        ("steps", np.uint8(9), 9),
        ("strength", np.float32(0.5), 0.5),
        ("strength", np.float64(0.25), 0.25),
        ("strength", Fraction(1, 4), 0.25),
        ("guidance", np.int32(2), 2),
        ("keep_colour", np.True_, True),
        ("style", np.str_("monet"), "monet"),
        ("solver", np.str_("unipc"), "unipc"),
        ("style", Enum("Artist", {"MONET": "monet"}, type=str).MONET, "monet"),  # type: ignore[attr-defined]
    ],
    ids=str,
)
def test_options_take_scalars_of_numpy_as_plain_values(name, value, plain):
    found = getattr(Options(**{**GOOD, name: value}), name)
    assert (found, type(found)) == (plain, type(plain))
    assert json.loads(json.dumps(dataclasses.asdict(Options(**{**GOOD, name: value}))))[name] == plain


@pytest.mark.parametrize(("name", "value"), _each(FAULTS))
def test_options_with_an_invalid_value_name_it(name, value):
    with pytest.raises(UsageError) as caught:
        Options(**{**GOOD, name: value})
    _, line = str(caught.value).split("\n")
    assert line.startswith(f"  - {name}: found {value!r}; expected ")


def test_options_with_many_invalid_values_name_them_all():
    wrong = {name: values[-1] for name, values in FAULTS.items()}
    assert wrong.keys() == GOOD.keys()
    with pytest.raises(UsageError) as caught:
        Options(**wrong)
    assert [line.split(":")[0] for line in str(caught.value).split("\n")[1:]] == [f"  - {name}" for name in GOOD]


def test_options_with_a_syntax_error_in_a_mix_point_at_it_beside_other_faults():
    with pytest.raises(UsageError) as caught:
        Options(**{**GOOD, "style": "vangogh:x+monet", "steps": 0})
    _, first, shown, caret, second = str(caught.value).split("\n")
    assert first.startswith("  - style: found ")
    assert shown.index("vangogh:x+monet") + len("vangogh:") == caret.index("^")
    assert second.startswith("  - steps: found 0")


def test_options_with_fit_stretch_and_size_0_are_invalid():
    with pytest.raises(UsageError, match=r"size: found 0 with fit stretch; expected .* such as 512"):
        Options(**{**GOOD, "size": 0, "fit": "stretch"})
    Options(**{**GOOD, "size": 0, "fit": "aspect"})


def test_preset_released_is_the_shipped_call():
    # docs/method.md §4: 50 DDIM steps, strength 0.7, scale 10, all ControlNet scales 1, stretched to 512 x 512.
    options = Options(style="monet", **preset_options("released"))
    shipped = {"steps": 50, "strength": 0.7, "guidance": 10.0, "control_scale": 1.0, "size": 512, "fit": "stretch"}
    assert dataclasses.asdict(options) == {**GOOD, **shipped, "solver": "ddim_lsast"}
    assert preset_options(None) == {}


def test_names_of_solvers_and_presets_are_those_that_exist():
    assert get_args(SolverName) == tuple(SOLVERS)
    assert get_args(PresetName) == tuple(PRESETS)


def test_stylize_has_the_signature_that_options_declare():
    """Every field of `Options` is a keyword of `stylize`, of the same type or None for the default."""
    scope = vars(lsast.stylizer) | dict.fromkeys(("Picture", "OnStep", "TemporalState", "StyleFile"), Any)
    hints = typing.get_type_hints(Stylizer.stylize, scope)
    parameters = inspect.signature(Stylizer.stylize).parameters
    declared = {name: hint | None for name, hint in typing.get_type_hints(Options).items()}
    assert {name: hints[name] for name in declared} == declared
    assert [*parameters] == ["self", "picture", *declared, "mask", "on_step", "cancel", "earlier"]
    assert all(parameters[name].default is None for name in declared)


def test_lsast_run_has_an_option_for_every_field_with_its_help():
    options = {parameter.name: parameter for parameter in main.params if isinstance(parameter, click.Option)}
    assert {main.make_context("lsast-run", []).params[name] for name in rules()} == {None}
    for name, rule in rules().items():
        assert options[name].opts[-1] == f"--{name.replace('_', '-')}"
        assert (options[name].help or "").startswith(rule.help)
