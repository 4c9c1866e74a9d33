from __future__ import annotations

import math
from collections.abc import Iterable

import pytest

from lsast_export.layer_choice import GROUPS, choose_layers


class Bench:
    """Layers whose roundings add up; a graph is the set of those that are rounded."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs = costs
        self.judged = 0

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.costs)

    def quantised(self, kept: Iterable[str]) -> frozenset[str]:
        return frozenset(self.costs) - set(kept)

    def error(self, graph: frozenset[str]) -> float:
        return sum(self.costs[layer] for layer in graph)

    def judge(self, graph: frozenset[str]) -> float:
        self.judged += 1
        return -10 * math.log10(self.error(graph) + 1e-12)


def bench(count: int = 2 * GROUPS) -> Bench:
    return Bench({f"layer{index}": {5: 1.0, 20: 0.1, 9: 0.5}.get(index, 1e-6) for index in range(count)})


def test_nothing_more_stays_in_float_where_paintings_are_near_at_once() -> None:
    lab = bench()
    choice = choose_layers(lab, frozenset({"layer5"}), lab.judge, lab.error, target=2)
    assert choice.kept == {"layer5"}
    assert lab.judged == 1


@pytest.mark.parametrize(
    ("target", "wanted"), [(2, {"layer5"}), (9, {"layer5", "layer9"}), (30, {"layer5", "layer9", "layer20"})]
)
def test_the_costliest_go_back_first_and_no_more_than_needed(target: float, wanted: set[str]) -> None:
    lab = bench()
    choice = choose_layers(lab, frozenset(), lab.judge, lab.error, target)
    neighbours = {f"layer{int(name[5:]) ^ 1}" for name in wanted}
    assert choice.kept == wanted | neighbours
    assert choice.psnr == lab.judge(lab.quantised(choice.kept)) >= target


@pytest.mark.parametrize("count", [1, 5, 100])
def test_all_layers_in_float_and_still_too_far_is_said(count: int) -> None:
    lab = bench(count)
    choice = choose_layers(lab, frozenset(), lab.judge, lab.error, target=1000)
    assert choice.kept == set(lab.layers)
    assert choice.psnr < 1000
