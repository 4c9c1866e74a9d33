"""The denoising loop where it runs best: on the GPU from the first step to the last, or on the host step by step.

Both compute the same, to within the rounding of the solver's update. On the device goes a plain run of a compiled
denoiser: one canvas without tiles, mask, shares by stage, frames to follow or parts left out. All else needs the host's
say between steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lsast_engines.engine import Engine
from lsast_engines.errors import BackendError
from lsast_engines.loop import DeviceLoop, Run
from lsast_engines.moves import moves
from lsast_engines.solvers import LinearSolver
from lsast_engines.style import Style
from lsast_engines.style_file import StyleFile, StyleRow
from lsast_engines.tensorrt import TensorRtEngine

from . import sampler
from .mixing import Hand, style_key
from .passes import Pass
from .sampler import Floats, Row, Watch

_log = logging.getLogger("lsast.runtime")

STYLE_MEMORY = 1 << 30
"""Bytes of keys and values that are kept on the device between paintings; those of one painting may be more."""


def denoise(
    engine: Engine,
    rows: Sequence[Row],
    null: Style,
    control: float,
    watch: Watch | None = None,
    passes: Sequence[Pass] | None = None,
) -> list[Floats]:
    """The denoising loop of `sampler.denoise`, on the device where that is possible.

    Args:
        engine: the `denoiser` graph.
        rows: the batch.
        null: keys and values of no style.
        control: what the ControlNet's residuals are multiplied with.
        watch: told of every step; None lets a device run ahead of the host.
        passes: see `sampler.denoise`; where one leaves something out, the host has a say.
    """
    whole = passes is None or set(passes) == {Pass(rows[0].guidance != 1, "inside", "whole")}
    loop = _loop(engine, null) if isinstance(engine, TensorRtEngine) and whole and _plain(rows) else None
    if loop is None:
        return sampler.denoise(engine, rows, null, control, watch, passes)
    names = [_reside(loop, row.hand, null) for row in rows]
    _make_room(loop, names)
    steps = list(zip(*(row.schedule.steps for row in rows), strict=True))
    run = Run(
        latents=np.stack([row.noisy for row in rows]).astype(np.float32, copy=False),
        hint=np.stack([row.hint for row in rows]),
        control=control,
        timesteps=np.array([[step.t for step in row] for row in steps], np.int64),
        moves=np.stack([_moves(row) for row in rows], axis=-1),
        guidance=[row.guidance for row in rows],
        styles=names,
        stages=[[step.stage for step in row] for row in steps],
    )
    latents = loop.run(run, watch and _first_as_the_picture(watch, rows))
    if not np.isfinite(latents).all():
        mend = "a smaller guidance" if engine.arithmetic == "fp32" else "arithmetic fp32, a smaller guidance"
        raise sampler.NotFiniteError(
            f"the loop of the denoiser gave {np.count_nonzero(~np.isfinite(latents))} values that are not finite, on "
            f"{engine.backend} in {engine.arithmetic}; try {mend}, or another backend"
        )
    return list(latents)


@dataclass(frozen=True)
class _Stages:
    """A hand with all its stages, as the device takes them."""

    name: str
    stages: int
    null: Style
    hand: Hand | Style | StyleFile

    @property
    def tokens(self) -> int:
        return self.null.tokens

    def width(self, tensor: str) -> int:
        return self.null.width(tensor)

    def row(self, stage: int) -> StyleRow:
        return self.hand.row(stage)


def _plain(rows: Sequence[Row]) -> bool:
    """Whether nothing but the solver has a say between the steps."""
    return all(
        isinstance(row.solver, LinearSolver) and all(row.share(step.stage) is None for step in row.schedule.steps)
        for row in rows
    )


def _loop(denoiser: TensorRtEngine, null: Style) -> DeviceLoop | None:
    """The loop of this denoiser, opened at its first use; None if its engine ``advance`` is not there."""
    for dependent in denoiser.dependents:
        if isinstance(dependent, DeviceLoop):
            return dependent
    try:
        return DeviceLoop(denoiser, null)
    except BackendError as error:
        _log.warning("the solver's steps are taken on the host: %s", error)
        return None


def _reside(loop: DeviceLoop, hand: Hand | Style | StyleFile, null: Style) -> str:
    """Have the keys and values of a hand on the device; the name that they are under there."""
    name = repr(hand.key if isinstance(hand, Hand) else style_key(hand))
    if name not in loop.styles:
        loop.styles.add(name, _Stages(name, hand.stages, null, hand))
    return name


def _make_room(loop: DeviceLoop, names: Sequence[str]) -> None:
    """Take styles off the device, those used longest ago first, but none of `names`."""
    for name in loop.styles.names:
        if loop.styles.bytes <= STYLE_MEMORY:
            break
        if name not in names:
            loop.styles.remove(name)


def _moves(row: Row) -> Floats:
    assert isinstance(row.solver, LinearSolver)
    return moves(row.solver, row.schedule.abars())


def _first_as_the_picture(watch: Watch, rows: Sequence[Row]) -> Watch:
    """Before the first step the clean latent is the picture's own, as the host's loop tells it."""

    def told(step: int, total: int, guesses: Sequence[Floats]) -> None:
        watch(step, total, guesses if step else [row.z0 for row in rows])

    return told
