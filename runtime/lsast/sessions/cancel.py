"""Stopping a painting from outside: from another thread, a button, a closed connection."""

from __future__ import annotations

import threading

from lsast_engines.errors import CancelledError


class CancelToken:
    """A switch that ends the paintings it was given to; it goes one way, and any thread may turn it.

    A painting looks at it before every graph and every step, so that it ends within one step, with `CancelledError`.
    One that waits for its turn ends at once.
    """

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End what was given this token. Any number of times."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Go on, or not.

        Raises:
            CancelledError: `cancel` was called.
        """
        if self.cancelled:
            raise CancelledError("the painting was cancelled; nothing was written")
