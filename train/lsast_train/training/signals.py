"""Stopping between two steps: a signal is noted and handled when everything is consistent."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from lsast_engines.errors import TrainingError


class InterruptionError(TrainingError):
    """A signal stopped the run after a whole step, and a checkpoint was written; the exit status is 128 + signal."""

    def __init__(self, number: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; {checkpoint} is whole: go on with --resume")
        self.exit_code = 128 + number


class DeferredSignals:
    """While entered, notes SIGINT and SIGTERM; a second signal is handled at once, as it was before.

    Does nothing outside the main thread, where Python handles no signals.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that came in, or 0."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
