"""Progress of long commands."""

import time
from collections.abc import Callable

from lsast_engines.cli import echo, quiet

Progress = Callable[..., None]
"""Is called with a phase as it begins; while it lasts, with what is being done and how far it is."""


def no_progress(phase: str, detail: str = "") -> None:
    """A `Progress` that shows nothing."""


class PhaseTimer:
    """A `Progress` that prints each phase on stderr as it begins, unless `--quiet` is given, and times it."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._starts: list[tuple[str, float]] = []

    def __call__(self, phase: str, detail: str = "") -> None:
        """See `Progress`."""
        now = time.perf_counter() - self._began
        if not detail:
            self._starts.append((phase, now))
        self._print(f"[{now:6.1f} s] {detail and '  '}{detail or phase}")

    def figure(self, text: str) -> None:
        """Print a figure below the phases that gave it, unless `--quiet` is given."""
        self._print(f"           {text}")

    def _print(self, line: str) -> None:
        if not quiet():
            echo(line, err=True)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in order; the last one ends now."""
        ends = [start for _, start in self._starts[1:]] + [time.perf_counter() - self._began]
        return {phase: round(end - start, 3) for (phase, start), end in zip(self._starts, ends, strict=True)}


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
