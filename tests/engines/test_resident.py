"""Styles on the device of a denoiser, on a fake GPU: row by row, without the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_denoiser import inputs, step, style
from fake_gpu import FakeCuda
from lsast_engines.errors import BackendError, StyleError, UsageError
from lsast_engines.resident import ResidentStyles
from lsast_engines.style import Style
from lsast_engines.tensorrt import TensorRtEngine

Compiled = Callable[..., Path]
Open = Callable[..., TensorRtEngine]


def test_resident_styles_are_bound_row_by_row_on_the_device(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    engine = open_it()
    null, one, two = style("null", 1, 1), style("one", 10, 2), style("two", 10, 3)
    styles = ResidentStyles(engine, null)
    styles.add("one", one)
    styles.add("two", two)
    feeds = inputs()
    del feeds["kv_unet"], feeds["kv_control"]
    cuda.calls.clear()
    for stages_now, guided in (((9, 9), True), ((9, 7), True), ((3, 3), True), ((0, 1), False)):
        styles.bind(["one", "two"], stages_now, guided=guided)
        hands = [one.row(stages_now[0]), two.row(stages_now[1])]
        kv_unet = [hand.kv_unet for hand in hands]
        halves = [[null.row(0).kv_unet] * 2, kv_unet] if guided else [kv_unet]
        rows = {"kv_unet": np.array(halves), "kv_control": np.array([hand.kv_control for hand in hands])}
        np.testing.assert_array_equal(engine(feeds)["eps"], step({**feeds, **rows}))
    assert cuda.calls.count("copy") == 3 * (4 + 2) + (2 + 2)
    assert cuda.calls.count("upload") == 4 * len(feeds)  # no key, no value
    assert "malloc" not in cuda.calls


def test_a_style_swap_runs_the_same_graph(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    engine = open_it()
    styles = ResidentStyles(engine, style("null", 1, 1))
    styles.add("one", style("one", 10, 2))
    styles.add("two", style("two", 10, 3))
    feeds = inputs(batch=1)
    del feeds["kv_unet"], feeds["kv_control"]
    pictures = []
    for name in ("one", "one", "two"):
        styles.bind([name], [4], guided=True)
        pictures.append(engine(feeds)["eps"].copy())
    assert cuda.calls.count("instantiate") == 1
    assert cuda.calls.count("launch") == 2
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])


def test_styles_give_their_memory_back(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    styles = ResidentStyles(open_it(), style("null", 1, 1))
    before = len(cuda.memory)
    styles.add("one", style("one", 10, 2))
    styles.add("one", style("one", 5, 3))
    assert len(cuda.memory) == before + 2
    styles.remove("one")
    styles.remove("one")
    assert len(cuda.memory) == before


@pytest.mark.parametrize(
    ("names", "stage", "error", "message"),
    [
        (["three"], 0, UsageError, "found styles three; expected of those added before: one"),
        ([], 0, UsageError, "found styles none"),
        (["one"], 10, UsageError, "found stage 10; expected 0 to 9"),
        (["one"] * 4, 0, BackendError, "was not compiled for this"),
    ],
)
def test_wrong_rows_are_refused_before_anything_is_copied(
    compiled: Compiled, open_it: Open, cuda: FakeCuda, names: list[str], stage: int, error: Any, message: str
) -> None:
    compiled()
    styles = ResidentStyles(open_it(), style("null", 1, 1))
    styles.add("one", style("one", 10, 2))
    with pytest.raises(error, match=message):
        styles.bind(names, [stage] * len(names), guided=True)
    assert "copy" not in cuda.calls


def test_a_style_of_other_widths_is_refused(compiled: Compiled, open_it: Open) -> None:
    compiled()
    wide = Style("wide", "b" * 64, 1, 3, np.zeros((1, 3, 8)), np.zeros((1, 3, 4)))
    with pytest.raises(StyleError, match=r"found kv_unet rows of \[3, 8\]; expected \[3, 6\]"):
        ResidentStyles(open_it(), wide)
