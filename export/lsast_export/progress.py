"""Progress of long commands."""

from __future__ import annotations

import time
from typing import Protocol


class Progress(Protocol):
    """Is called when a phase begins and while it lasts."""

    def __call__(self, phase: str, detail: str = "") -> None:
        """`phase` begins; or, with `detail`, it goes on and is at `detail`."""


def no_progress(phase: str, detail: str = "") -> None:
    """A `Progress` that shows nothing."""


class Eta:
    """Counts the equal steps of a phase and estimates how long the rest will take."""

    def __init__(self, progress: Progress, phase: str, total: int) -> None:
        self._progress, self._phase, self._total = progress, phase, total
        self._began = time.perf_counter()
        self._done = 0

    def step(self) -> None:
        """One more step is done."""
        self._done += 1
        left = (time.perf_counter() - self._began) / self._done * (self._total - self._done)
        self._progress(self._phase, f"step {self._done} of {self._total}, about {left:.0f} s left")
