"""Telling how far a long command is."""

from __future__ import annotations

import time
from typing import Protocol


class Progress(Protocol):
    """Told what goes on."""

    def __call__(self, phase: str, detail: str = "") -> None:
        """A phase begins; with `detail`, it goes on, and this is how far it is."""


def silent(phase: str, detail: str = "") -> None:
    """A `Progress` that nobody sees."""


class Countdown:
    """Counts the equal steps of a phase and says how long the rest will take."""

    def __init__(self, progress: Progress, phase: str, total: int) -> None:
        self._progress, self._phase, self._total = progress, phase, total
        self._began = time.perf_counter()
        self._done = 0

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        left = (time.perf_counter() - self._began) / self._done * (self._total - self._done)
        self._progress(self._phase, f"step {self._done} of {self._total}, about {left:.0f} s left")
