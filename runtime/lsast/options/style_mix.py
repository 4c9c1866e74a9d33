"""The grammar of style mixes, the same for the command line, the library and files.

::

    vangogh                        one style
    vangogh:0.6+monet:0.4          two, by weight
    vangogh@up+monet@down          by layer group: down (encoder), mid, up (decoder) of the networks
    vangogh@0-4+monet@5-9          by stage of the noise schedule, both ends included, 0 next to the clean picture
    vangogh:0.7@up+monet@0-4       each term with a weight, a group and a range of stages, or without

`lsast.sampling.mixed_style` says what a mix means.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lsast_engines.errors import UsageError

GROUPS = ("down", "mid", "up")
"""The layer groups, in the order in which a network runs them: `lsast_engines.bundle.manifest.Group`."""


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
    stages_column: int = 0
    """Column of the stages in the text."""

    def applies_to(self, stage: int, group: str) -> bool:
        """Whether the term applies to `group` at `stage`."""
        here = self.stages is None or self.stages[0] <= stage <= self.stages[1]
        return here and self.group in (None, group)


@dataclass(frozen=True)
class Mix:
    """A text of the grammar, parsed."""

    text: str
    terms: tuple[Term, ...]

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def parse(text: str) -> Mix:
        """Read a text of the grammar; a text that comes again is not parsed again.

        Raises:
            UsageError: a syntax error; the message shows the text with a caret under the character.
        """
        terms = []
        start = 0
        for piece in text.split("+"):
            terms.append(_term(text, start, piece))
            start += len(piece) + 1
        return Mix(text, tuple(terms))

    @property
    def styles(self) -> list[str]:
        """Names of the styles, each once, in order."""
        return list(dict.fromkeys(term.style for term in self.terms))

    @property
    def is_single(self) -> bool:
        """Whether this is one style, everywhere, so that nothing is mixed."""
        return len(self.terms) == 1 and self.terms[0].group is None and self.terms[0].stages is None

    def check(self, styles: Sequence[str], stages: int) -> None:
        """Check that a bundle has the styles and the stages of the mix.

        Args:
            styles: names of the bundle's styles.
            stages: its number of stages.

        Raises:
            UsageError: an unknown style or stage, with a caret under it.
        """
        for term in self.terms:
            if term.style not in styles:
                raise syntax_error(
                    f"found no style {term.style!r}; available: {', '.join(styles) or 'none'} "
                    f"(make it with: lsast-export --style {term.style})",
                    self.text,
                    term.column,
                )
            if term.stages and term.stages[1] >= stages:
                raise syntax_error(
                    f"found stage {term.stages[1]}; expected 0 to {stages - 1}", self.text, term.stages_column
                )


def syntax_error(fault: str, text: str, column: int) -> UsageError:
    """An error that shows `text` with a caret under its character `column`."""
    return UsageError(f"{fault}\n    {text}\n    {' ' * column}^")


def read_stages(text: str, whole: str, column: int) -> tuple[int, int]:
    """Read a stage or a range of stages, ``4`` or ``0-4``.

    Args:
        text: the piece to read.
        whole: the text that contains the piece, for the message.
        column: where the piece begins in it.

    Raises:
        UsageError: no range, or one that runs backwards.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if found is None:
        raise syntax_error(f"found {text.strip()!r}; expected a stage or a range such as 4 or 0-4", whole, column)
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise syntax_error(f"found the range {first}-{last}; expected {last}-{first}", whole, column)
    return first, last


def _term(text: str, start: int, piece: str) -> Term:
    """The term that `piece` is, which begins at column `start` of `text`."""
    head, *places = piece.split("@")
    name, colon, number = head.partition(":")
    if not name.strip():
        raise syntax_error("found no name; expected that of a style", text, start + len(name) - len(name.lstrip()))
    column = start + len(name) - len(name.lstrip())
    if inner := re.search(r"\s", name.strip()):
        raise syntax_error("found a space in a name; expected +, or no space", text, column + inner.start())
    weight = 1.0
    if colon:
        weight = _weight(text, start + len(name) + 1, number)
    group: str | None = None
    stages: tuple[int, int] | None = None
    stages_column = 0
    at = start + len(head) + 1
    for place in places:
        where, word = at + len(place) - len(place.lstrip()), place.strip()
        if word in GROUPS and group is None:
            group = word
        elif word[:1].isdigit() and stages is None:
            stages, stages_column = read_stages(word, text, where), where
        elif word in GROUPS or word[:1].isdigit():
            kind = "layer group" if word in GROUPS else "range of stages"
            raise syntax_error(f"found a second {kind}; expected one a style: name the style again", text, where)
        else:
            raise syntax_error(f"found {word!r}; expected {', '.join(GROUPS)}, or stages such as 0-4", text, where)
        at += len(place) + 1
    return Term(name.strip(), weight, group, stages, column, stages_column)


def _weight(text: str, column: int, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise syntax_error(f"found {number.strip()!r}; expected a weight above 0, such as 0.6", text, column)
    return weight
