"""Stopping a painting from outside: from another thread, a button, a closed connection."""

import threading

from lsast_engines.errors import CancelledError


class CancelToken:
    """Cancels the paintings that it was given to, for good; any thread may do so. A painting ends within one step, with
    `CancelledError`; one that waits for the engines ends at once."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Cancel the paintings that were given this token; calling it again has no effect."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise a `CancelledError` if `cancel` was called."""
        if self.cancelled:
            raise CancelledError("the painting was cancelled; nothing was written")
