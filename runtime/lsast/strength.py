"""How far a painting may go from its picture: over the whole schedule, and stage by stage.

::

    0.7                    run the last 70 % of the schedule
    0.7,0.4@0-2            the same, but in stages 0 to 2 the painting has a say of 40 %, the picture itself of 60 %
    0.8,0.5@3-9,0@0        any number of stages or ranges; of two that hold a stage, the later counts

Stage 0 is next to the clean picture: a small share there keeps the picture's own fine detail, one at high stages keeps
its masses and colours. The share w of a stage enters each of its steps through what the step takes the clean picture to
be, x0' = w · x0 + (1 - w) · z0 with z0 the picture's own latent, and so acts alike with every solver and with any
number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .mixing import pointed, read_stages


@dataclass(frozen=True)
class Strength:
    """A strength, taken apart."""

    overall: float
    """Share of the schedule that is run: above 0, up to 1."""
    parts: tuple[tuple[int, int, float], ...] = ()
    """First stage, last stage, and the painting's share in them, 0 to 1."""
    text: str = ""
    """Where it was read from, for messages."""

    @classmethod
    def parse(cls, value: float | str) -> Strength:
        """Read a number, or a text of the grammar.

        Raises:
            UsageError: it is none; the message shows the text with a caret under the character.
        """
        if not isinstance(value, str):
            return cls(float(value))
        overall: float | None = None
        parts = []
        start = 0
        for piece in value.split(","):
            number, at, place = piece.partition("@")
            share = _number(value, start, number)
            if at:
                parts.append((*read_stages(place, value, start + len(number) + 1), share))
            elif overall is not None:
                raise pointed("found a second strength; expected stages after it, such as 0.4@0-2", value, start)
            elif share == 0:
                raise pointed("found a strength of 0; expected one above 0", value, start)
            else:
                overall = share
            start += len(piece) + 1
        if overall is None:
            raise pointed("found no strength of the whole; expected one besides, such as 0.7,0.4@0-2", value, 0)
        return cls(overall, tuple(parts), value)

    def check(self, stages: int) -> None:
        """Make sure that a bundle has the stages.

        Raises:
            UsageError: it has not, with a caret under the range.
        """
        for (_, last, _), piece_start in zip(self.parts, self._columns(), strict=True):
            if last >= stages:
                raise pointed(f"found stage {last}; expected 0 to {stages - 1}", self.text, piece_start)

    def share(self, stage: int) -> float:
        """The painting's share at a stage, 0 to 1."""
        shares = [share for first, last, share in self.parts if first <= stage <= last]
        return shares[-1] if shares else 1.0

    def _columns(self) -> list[int]:
        return [column + 1 for column, character in enumerate(self.text) if character == "@"]


def _number(text: str, column: int, number: str) -> float:
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise pointed(f"found {number.strip()!r}; expected a number from 0 to 1", text, column)
    return share
