"""Which layers stay in float: those whose rounding is measured to cost most, until paintings come near enough.

Layers are tried in groups of neighbours: what a group costs is how much nearer the denoiser's output comes when that
group alone is given back to float. The costliest go back first, one group after the other, and after each paintings
are judged anew.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .progress import Progress, silent

GROUPS = 16
"""Groups of layers that are tried."""

Graph = TypeVar("Graph")
Made = TypeVar("Made", covariant=True)


class Quantiser(Protocol[Made]):
    """What `calibration.Calibration` offers here."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the graph."""

    def quantised(self, kept: Iterable[str]) -> Made:
        """The graph with every layer in 8 bits but those that are `kept`."""


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    kept: frozenset[str]
    """The layers that stay in float."""
    psnr: float
    """What `judge` said, in dB; below the target if even all groups in float do not reach it, nan if none was
    asked for."""


def choose_layers(
    quantiser: Quantiser[Graph],
    kept: frozenset[str],
    judge: Callable[[Graph], float],
    error: Callable[[Graph], float],
    target: float,
    progress: Progress = silent,
) -> Choice:
    """As few further layers in float as bring `judge` to `target`.

    Args:
        quantiser: makes graphs, one for each question: `judge` and `error` may use theirs up.
        kept: layers that stay in float in any case.
        judge: mean PSNR of paintings in dB; dear.
        error: of the graph's output, relative; cheap.
        target: least PSNR; 0 or less asks for nothing, and nothing is judged.
        progress: told of each group.
    """
    if target <= 0:
        return Choice(kept, math.nan)
    found = judge(quantiser.quantised(kept))
    if found >= target:
        return Choice(kept, found)
    phase = f"choosing layers: {found:.1f} dB, {target:g} are wanted"
    progress(phase)
    costs = []
    groups = _groups([layer for layer in quantiser.layers if layer not in kept])
    for number, group in enumerate(groups):
        costs.append(error(quantiser.quantised(kept | set(group))))
        progress(phase, f"group {number + 1} of {len(groups)} in float: error {costs[-1]:.2e}")
    for _, group in sorted(zip(costs, groups, strict=True), key=lambda pair: pair[0]):
        kept |= set(group)
        found = judge(quantiser.quantised(kept))
        progress(phase, f"{len(kept)} layers in float: {found:.1f} dB")
        if found >= target:
            break
    return Choice(kept, found)


def _groups(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """`layers` in at most `GROUPS` runs of nearly equal length."""
    count = min(GROUPS, len(layers))
    ends = [len(layers) * index // count for index in range(count + 1)] if count else []
    return [tuple(layers[begin:end]) for begin, end in itertools.pairwise(ends)]
