"""Mixing styles: one grammar for the command line, the library and files, and the keys and values that it means.

::

    vangogh                        one style
    vangogh:0.6+monet:0.4          two, by weight
    vangogh@up+monet@down          by layer group: down (encoder), mid, up (decoder) of the networks
    vangogh@0-4+monet@5-9          by stage of the noise schedule, both ends included, 0 next to the clean picture
    vangogh:0.7@up+monet@0-4       each term with a weight, a group and a range of stages, or without

Every pair of a stage and a layer group is mixed by itself: the weights of the terms that reach it are divided by their
sum. Where no term reaches, the base's unconditional keys and values stand, so that nothing is painted in there.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from lsast_engines.bundle.manifest import AttentionLayer, Group
from lsast_engines.bundle.style import TENSORS, StageKV, Style, StyleFile
from lsast_engines.errors import UsageError

GROUPS: tuple[str, ...] = get_args(Group)
"""The layer groups, in the order in which a network runs them."""

_NETWORKS = {"kv_unet": "unet", "kv_control": "control"}


@dataclass(frozen=True)
class Term:
    """One style of a mix, and where it reaches."""

    style: str
    weight: float = 1.0
    """Above 0; only its ratio to the weights of the terms that reach the same place counts."""
    group: str | None = None
    """One of `GROUPS`; None is all of them."""
    stages: tuple[int, int] | None = None
    """First and last stage; None is all of them."""
    column: int = 0
    """Where it begins in the text, for messages."""
    stages_column: int = 0
    """Where its range of stages begins in the text."""

    def reaches(self, stage: int, group: str) -> bool:
        """Whether the term has a say in `group` at `stage`."""
        here = self.stages is None or self.stages[0] <= stage <= self.stages[1]
        return here and self.group in (None, group)


@dataclass(frozen=True)
class Mix:
    """A text of the grammar, taken apart."""

    text: str
    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Read a text of the grammar.

        Raises:
            UsageError: it is none; the message shows the text with a caret under the character.
        """
        terms = []
        start = 0
        for piece in text.split("+"):
            terms.append(_term(text, start, piece))
            start += len(piece) + 1
        return cls(text, tuple(terms))

    @property
    def styles(self) -> list[str]:
        """The names in it, each once, in order."""
        return list(dict.fromkeys(term.style for term in self.terms))

    def check(self, styles: Sequence[str], stages: int) -> None:
        """Make sure that a bundle has what the text asks for.

        Args:
            styles: names of the bundle's styles.
            stages: its number of stages.

        Raises:
            UsageError: an unknown style or stage, with a caret under it.
        """
        for term in self.terms:
            if term.style not in styles:
                raise pointed(
                    f"found no style {term.style!r}; there: {', '.join(styles) or 'none'} "
                    f"(make it with: lsast-export --style {term.style})",
                    self.text,
                    term.column,
                )
            if term.stages and term.stages[1] >= stages:
                raise pointed(
                    f"found stage {term.stages[1]}; expected 0 to {stages - 1}", self.text, term.stages_column
                )


class Hand:
    """Keys and values of a mix, row by row; what the denoiser paints with."""

    def __init__(
        self,
        mix: Mix,
        styles: Mapping[str, StyleFile | Style],
        null: Style,
        layers: Sequence[AttentionLayer],
    ) -> None:
        """Bring a mix and the styles that it names together.

        Args:
            mix: what to mix.
            styles: every style of it, all of one base.
            null: the base's unconditional keys and values.
            layers: the manifest's `attention_layers`.
        """
        self._mix = mix
        self._styles = styles
        self.stages = min(style.stages for style in styles.values())
        self._null = null
        self._columns = {
            (tensor, group): [
                slice(layer.offset, layer.offset + 2 * layer.width)
                for layer in layers
                if (layer.network, layer.group) == (network, group)
            ]
            for tensor, network in _NETWORKS.items()
            for group in GROUPS
        }

    @property
    def key(self) -> Hashable:
        """Equal for hands of equal rows: the mix, and what its styles hold."""
        return self._mix.text, tuple(style_key(self._styles[name]) for name in self._mix.styles)

    def stage(self, stage: int) -> StageKV:
        """Keys and values of one stage, 0 … stages - 1; new arrays, or those of the one style there is.

        Raises:
            StyleError: a style's file is damaged.
        """
        if len(self._mix.terms) == 1 and all(self._mix.terms[0].reaches(stage, group) for group in GROUPS):
            return self._styles[self._mix.terms[0].style].stage(stage)
        null = self._null.stage(stage if self._null.stages > 1 else 0)
        mixed = {tensor: np.array(getattr(null, tensor)) for tensor in TENSORS}
        for group in GROUPS:
            terms = [term for term in self._mix.terms if term.reaches(stage, group)]
            total = sum(term.weight for term in terms)
            for tensor in TENSORS if terms else ():
                for columns in self._columns[tensor, group]:
                    mixed[tensor][:, columns] = sum(
                        term.weight / total * self._part(term, stage, tensor)[:, columns].astype(np.float64)
                        for term in terms
                    )
        return StageKV(*(mixed[tensor] for tensor in TENSORS))

    def _part(self, term: Term, stage: int, tensor: str) -> np.ndarray:
        part: np.ndarray = getattr(self._styles[term.style].stage(stage), tensor)
        return part


def style_key(style: StyleFile | Style) -> str:
    """Equal for equal keys and values: SHA-256 (hex) over them."""
    if isinstance(style, StyleFile):
        return style.fingerprint
    return hashlib.sha256(b"".join(getattr(style, tensor).tobytes() for tensor in TENSORS)).hexdigest()


def pointed(fault: str, text: str, column: int) -> UsageError:
    """An error that shows `text` with a caret under its character `column`."""
    return UsageError(f"{fault}\n    {text}\n    {' ' * column}^")


def read_stages(text: str, whole: str, column: int) -> tuple[int, int]:
    """Read a stage or a range of stages, ``4`` or ``0-4``.

    Args:
        text: the piece to read.
        whole: the text it is a piece of, which the message shows.
        column: where the piece begins in it.

    Raises:
        UsageError: it is none, or runs backwards.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if found is None:
        raise pointed(f"found {text.strip()!r}; expected a stage or a range such as 4 or 0-4", whole, column)
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise pointed(f"found the range {first}-{last}; expected {last}-{first}", whole, column)
    return first, last


def _term(text: str, start: int, piece: str) -> Term:
    """The term that `piece` is, which begins at column `start` of `text`."""
    head, *places = piece.split("@")
    name, colon, number = head.partition(":")
    if not name.strip():
        raise pointed("found no name; expected that of a style", text, start + len(name) - len(name.lstrip()))
    column = start + len(name) - len(name.lstrip())
    if inner := re.search(r"\s", name.strip()):
        raise pointed("found a space in a name; expected a name, or + before the next", text, column + inner.start())
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
            raise pointed(f"found a second {kind}; expected one a style: name the style again", text, where)
        else:
            raise pointed(f"found {word!r}; expected {', '.join(GROUPS)}, or stages such as 0-4", text, where)
        at += len(place) + 1
    return Term(name.strip(), weight, group, stages, column, stages_column)


def _weight(text: str, column: int, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise pointed(f"found {number.strip()!r}; expected a weight above 0, such as 0.6", text, column)
    return weight
