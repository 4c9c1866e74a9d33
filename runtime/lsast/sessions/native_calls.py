"""Calls of native code that the end of Python waits for.

When Python ends, it stops each daemon thread as soon as the thread asks for the interpreter's lock. Inside the C++ code
of a backend or of OpenCV this aborts the whole process. So the end of Python refuses new calls and waits for those that
run; a painting asks before every run of a graph whether it may go on.
"""

import atexit
import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator

from lsast_engines.errors import UsageError


class _Calls:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.depths: Counter[int] = Counter()
        self.python_ends = False

    def add(self, number: int) -> None:
        with self.changed:
            self.depths[threading.get_ident()] += number
            self.changed.notify_all()

    def wait(self) -> None:
        with self.changed:
            self.python_ends = True
            here = threading.get_ident()
            while any(depth > 0 for thread, depth in self.depths.items() if thread != here):
                self.changed.wait()


_calls = _Calls()


@contextlib.contextmanager
def native_call() -> Iterator[None]:
    """The end of Python waits for the block, which must end by itself. Errors as of `require_python`."""
    with _counted(1):
        require_python()
        yield


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """A block inside `native_call` that calls a function of the user, for which the end of Python does not wait. Errors
    as of `require_python`, at its end."""
    with _counted(-1):
        yield
    require_python()


@contextlib.contextmanager
def _counted(number: int) -> Iterator[None]:
    calls = _calls
    calls.add(number)
    try:
        yield
    finally:
        if calls is _calls:  # else this is a forked process, where nobody unlocks what another thread had locked
            calls.add(-number)


def calling_threads() -> set[int]:
    """The threads that are in a `native_call`, by their identifiers."""
    return {thread for thread, depth in list(_calls.depths.items()) if depth > 0}


def require_python() -> None:
    """Raise a `UsageError` if Python has begun to end."""
    if _calls.python_ends:
        raise UsageError("found a painting while Python ends; nothing was written")


def _after_fork() -> None:
    global _calls
    _calls = _Calls()


atexit.register(lambda: _calls.wait())
if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)
