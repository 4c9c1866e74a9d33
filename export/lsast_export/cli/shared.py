"""What the commands of ``lsast-export`` share."""

from __future__ import annotations

import time

from lsast_engines.cli import echo

EXTRA = ("export", "torch", "diffusers", "onnx", "onnxscript")
"""The extra that most commands require, and libraries of it."""


class PhaseTimer:
    """A `Progress` that prints each phase on stderr as it begins, and measures how long each takes."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._starts: list[tuple[str, float]] = []

    def __call__(self, phase: str, detail: str = "") -> None:
        """See `lsast_export.progress.Progress`."""
        now = time.perf_counter() - self._began
        if not detail:
            self._starts.append((phase, now))
        echo(f"[{now:6.1f} s] {detail and '  '}{detail or phase}", err=True)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in order; the last one ends now."""
        ends = [start for _, start in self._starts[1:]] + [time.perf_counter() - self._began]
        return {phase: round(end - start, 3) for (phase, start), end in zip(self._starts, ends, strict=True)}
