"""The grammar of mixes."""

from enum import Enum
from typing import get_args

import pytest

from lsast import UsageError
from lsast.options.style_mix import GROUPS, Mix
from lsast.request import resolve_options
from lsast_engines.bundle.manifest import Group
from lsast_engines.bundle.style import StyleFile


def test_mix_ignores_spaces_around_signs():
    spaced = Mix.parse(" vangogh : 0.6 @ up @ 0 - 4 + monet".replace("0 - 4", "0-4"))
    assert [(t.style, t.weight, t.group, t.stages) for t in spaced.terms] == [
        ("vangogh", 0.6, "up", (0, 4)),
        ("monet", 1.0, None, None),
    ]
    assert spaced.styles == ["vangogh", "monet"]


FAULTS = [
    ("", "", "name"),
    ("vangogh+", "vangogh+", "name"),
    ("+monet", "", "name"),
    ("vangogh++monet", "vangogh+", "name"),
    (":0.5", "", "name"),
    ("vangogh:", "vangogh:", "weight above 0"),
    ("vangogh:x+monet", "vangogh:", "weight above 0"),
    ("vangogh+monet:-1", "vangogh+monet:", "weight above 0"),
    ("vangogh:0+monet", "vangogh:", "weight above 0"),
    ("vangogh:nan", "vangogh:", "weight above 0"),
    ("vangogh:1:2", "vangogh:1:", "expected one a style, after its name"),
    ("vangogh@up:1", "vangogh@up:", "expected one a style, after its name"),
    ("vangogh@top", "vangogh@", "down, mid, up"),
    ("vangogh@", "vangogh@", "down, mid, up"),
    ("vangogh:0.7@up+monet@0-x", "vangogh:0.7@up+monet@", "a range such as"),
    ("vangogh@5-3", "vangogh@", "expected 3-5"),
    ("vangogh@up@mid", "vangogh@up@", "second layer group"),
    ("vangogh@1@2-3", "vangogh@1@", "second range"),
    ("vangogh monet", "vangogh", "a space in a name"),
    (f"vangogh@{5000 * '1'}", "vangogh@", "a range such as"),
    ("vangogh:1e308+monet:1e308", "", "sum is infinite"),
]


@pytest.mark.parametrize(("text", "before", "words"), FAULTS)
def test_mix_with_a_syntax_error_points_at_it(text, before, words):
    with pytest.raises(UsageError, match=words) as caught:
        Mix.parse(text)
    _, shown, caret = str(caught.value).split("\n")
    assert shown == f"    {text}"
    assert caret == f"    {' ' * len(before)}^"


class Artist(str, Enum):
    BOTH = "monet+picasso"


@pytest.mark.parametrize(
    ("text", "before", "words"),
    [
        (
            "vangogh:0.5+picasso",
            "vangogh:0.5+",
            "'picasso' for the bundle .*; available: monet, vangogh; learn it",
        ),
        ("vangog", "", r"available: monet, vangogh; did you mean vangogh\?"),
        ("vangogh+monet@4-10", "vangogh+monet@", "found stage 10; expected 0 to 9"),
        (Artist.BOTH, "monet+", "\n    monet\\+picasso\n"),  # shown as its value
    ],
)
def test_resolve_points_at_what_of_a_mix_the_bundle_lacks(stylizer, text, before, words):
    with pytest.raises(UsageError, match=words) as caught:
        stylizer.resolve(style=text)
    assert str(caught.value).split("\n")[-1] == f"    {' ' * len(before)}^"


def test_resolve_options_opens_each_style_of_a_mix_once(stylizer):
    opened: list[str] = []

    def open_style(name: str) -> StyleFile:
        opened.append(name)
        return stylizer.bundle.open_style(name)

    resolve_options(stylizer.bundle, {"style": "monet@up+vangogh+monet@down"}, None, open_style)
    assert opened == ["monet", "vangogh"]


def test_groups_are_those_of_the_manifest():
    assert get_args(Group) == GROUPS


@pytest.mark.parametrize(
    ("text", "single"),
    [("vangogh", True), ("vangogh:0.3", True), ("vangogh@up", False), ("vangogh@0-4", False), ("vangogh+monet", False)],
)
def test_mix_is_single_only_for_one_style_everywhere(text, single):
    assert Mix.parse(text).is_single == single
