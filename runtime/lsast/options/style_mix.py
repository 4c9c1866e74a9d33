"""The grammar of style mixes, the same for the command line, the library and files.

::

    vangogh                        one style
    vangogh:0.6+monet:0.4          two, by weight
    vangogh@up+monet@down          by layer group: down (encoder), mid, up (decoder) of the networks
    vangogh@0-4+monet@5-9          by stage of the noise schedule, both ends included, 0 next to the clean picture
    vangogh:0.7@up+monet@0-4       each term with a weight, a group and a range of stages, or without

`lsast.sampling.batch` says what a mix means.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from itertools import pairwise

from lsast_engines.errors import Lines, UsageError, shown

GROUPS = ("down", "mid", "up")
"""The layer groups, in the order in which a network runs them: `lsast_engines.bundle.manifest.Group`."""

MAX_TERMS = 100
"""Most terms of a mix."""


@dataclass(frozen=True)
class Term:
    """One style of a mix, and where it applies."""

    style: str
    weight: float = 1.0
    """Above 0; only its ratio to the weights of the other terms that apply at the same place counts."""
    group: str | None = None
    """One of `GROUPS`; None is all of them."""
    stages: tuple[int, int] | None = None
    """First and last stage; None is all of them."""
    column: int = 0
    """Column of the style's name in the text, for messages."""

    def applies_to(self, stage: int, group: str) -> bool:
        """Whether the term applies to `group` at `stage`."""
        here = self.stages is None or self.stages[0] <= stage <= self.stages[1]
        return here and self.group in (None, group)


@dataclass(frozen=True)
class Mix:
    """A text of the grammar, parsed."""

    terms: tuple[Term, ...]

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def parse(text: str, stages: float = math.inf) -> Mix:
        """Read a text of the grammar, for a bundle of so many `stages`; a `UsageError` shows the text with a caret
        under the character that is wrong."""
        if (count := text.count("+") + 1) > MAX_TERMS:
            raise UsageError(f"found a mix of {count} styles; expected at most {MAX_TERMS}")
        starts = [0, *(match.end() for match in re.finditer(r"\+", text)), len(text) + 1]
        terms = tuple(_term(text, start, end - 1, stages) for start, end in pairwise(starts))
        if math.isinf(sum(term.weight for term in terms)):
            raise syntax_error("found weights whose sum is infinite; expected smaller ones", text, 0)
        return Mix(terms)

    @property
    def styles(self) -> list[str]:
        """Names of the styles, each once, in order."""
        return list(dict.fromkeys(term.style for term in self.terms))

    @property
    def is_single(self) -> bool:
        """Whether this is one style, everywhere, so that nothing is mixed."""
        return len(self.terms) == 1 and self.terms[0].group is None and self.terms[0].stages is None


def syntax_error(fault: str, text: str, column: int) -> UsageError:
    """An error that shows `text` with a caret under its character `column`."""
    return UsageError(Lines(f"{shown(fault)}\n    {shown(text)}\n    {' ' * len(shown(text[:column]))}^"))


def _term(text: str, start: int, end: int, count: float) -> Term:
    """Read the term in columns `start` to `end` of `text`, for a bundle of `count` stages."""
    # The name and then, each with its sign, the weight and the places; and the column where each begins.
    (_, column, name), *parts = [
        (match[1], match.start(2), match[2].rstrip()) for match in re.finditer(r"(^|[:@])\s*([^:@]*)", text[start:end])
    ]
    column += start
    if not name:
        raise syntax_error("found no name; expected that of a style", text, column)
    if inner := re.search(r"\s", name):
        raise syntax_error("found a space in a name; expected +, or no space", text, column + inner.start())
    weight, group, stages = 1.0, None, None
    for index, (sign, where, word) in enumerate(parts):
        where += start
        if sign == ":" and index > 0:
            raise syntax_error("found a weight; expected one a style, after its name: vangogh:0.6@up", text, where)
        if sign == ":":
            weight = _weight(word, text, where)
        elif word in GROUPS and group is None:
            group = word
        elif word[:1].isdigit() and stages is None:
            stages = _stages(word, text, where, count)
        elif word in GROUPS or word[:1].isdigit():
            kind = "layer group" if word in GROUPS else "range of stages"
            raise syntax_error(f"found a second {kind}; expected one a style: name the style again", text, where)
        else:
            raise syntax_error(f"found {word!r}; expected {', '.join(GROUPS)}, or stages such as 0-4", text, where)
    return Term(name, weight, group, stages, column)


def _weight(word: str, text: str, column: int) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise syntax_error(f"found {word!r}; expected a weight above 0, such as 0.6", text, column)
    return weight


def _stages(word: str, text: str, column: int, count: float) -> tuple[int, int]:
    """Read a stage or a range of stages, ``4`` or ``0-4``, of `count`."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
    if found is None:
        raise syntax_error(f"found {word!r}; expected a stage or a range such as 4 or 0-4", text, column)
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise syntax_error(f"found the range {first}-{last}; expected {last}-{first}", text, column)
    if last >= count:
        raise syntax_error(f"found stage {last}; expected 0 to {count - 1}", text, column)
    return first, last
