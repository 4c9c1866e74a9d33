"""The open engines and styles of one process, and who may use them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lsast_engines.backends.base import ComputeDtype, Engine, open_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS
from lsast_engines.errors import UsageError

from .cancel import CancelToken
from .style_cache import Shelf

STYLE_MEMORY = 256 * 2**20
"""Bytes of styles that are kept in memory between paintings, if nothing else is said."""

_LOOK = 0.05
"""Seconds between two looks at the token of one that waits for its turn."""

_workshops: weakref.WeakSet[Workshop] = weakref.WeakSet()
"""Those that a fork has to renew."""


@dataclass(frozen=True)
class Opener:
    """How the graphs of a bundle are opened, here and in any other process."""

    bundle: Bundle
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    compute_dtype: ComputeDtype = "fp32"

    def __post_init__(self) -> None:
        if self.bundle.manifest.storage_dtype == "int8" and self.compute_dtype != "fp32":
            # OpenVINO 2026.4 fails to open a float convolution in bf16 whose output is quantised.
            raise UsageError(
                f"found compute_dtype {self.compute_dtype} for {self.bundle.path}, which is in int8; expected fp32, "
                "which is then what is not in int8: leave it out"
            )

    def __call__(self, name: str, compute_dtype: ComputeDtype | None = None) -> Engine:
        """Open the graph `name`, in another arithmetic if one is given.

        Raises:
            LsastError: see `lsast_engines.backends.base.open_engine`.
        """
        return open_engine(
            self.bundle.graph_path(name),
            self.bundle.manifest.graphs[name],
            self.backend,
            self.device,
            self.threads,
            compute_dtype or self.compute_dtype,
        )

    def all(self, names: Iterable[str] = REQUIRED_GRAPHS) -> dict[str, Engine]:
        """Open the graphs `names`, or none; else those that a painting passes from which nothing is left out."""
        with contextlib.ExitStack() as stack:
            engines: dict[str, Engine] = {}
            for name in names:
                engines[name] = self(name)
                stack.callback(engines[name].close)
            stack.pop_all()
        return engines


class Workshop:
    """Engines, styles and the turn to use them. An engine serves one thread at a time, so there is one turn."""

    def __init__(self, opener: Opener, engines: Mapping[str, Engine], style_memory: int) -> None:
        """A workshop.

        Args:
            opener: opens the graphs again.
            engines: the open graphs.
            style_memory: see `Shelf`.
        """
        self.opener = opener
        self._style_memory = style_memory
        self._closed = False
        self._first = tuple(engines)
        self._begin(dict(engines), opened=True)
        _workshops.add(self)

    def _begin(self, engines: dict[str, Engine], *, opened: bool) -> None:
        self.engines = engines
        self.shelf = Shelf(self.opener.bundle, self._style_memory)
        self._opened = opened
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._queue: ThreadPoolExecutor | None = None

    def engine(self, name: str) -> Engine:
        """The engine of the graph `name`, opened at its first use and kept; for whoever has the turn.

        Raises:
            LsastError: see `lsast_engines.backends.base.open_engine`.
        """
        if name not in self.engines:
            self.engines[name] = self.opener(name)
        return self.engines[name]

    @contextlib.contextmanager
    def turn(self, cancel: CancelToken | None = None) -> Iterator[None]:
        """Wait until no other thread is at work, and keep the others waiting while the block runs.

        Raises:
            UsageError: the stylizer is closed, or this very thread is at work.
            CancelledError: `cancel` was turned meanwhile.
        """
        if self._holder == threading.get_ident():
            raise UsageError("found a call from inside on_step; expected it after the painting, or another stylizer")
        while not self._lock.acquire(timeout=_LOOK if cancel else -1):
            if cancel:
                cancel.check()
        try:
            self._holder = threading.get_ident()
            if self._closed:
                raise UsageError("the stylizer is closed; open another one with lsast.load()")
            if not self._opened:
                self.engines, self._opened = self.opener.all(self._first), True
            if cancel:
                cancel.check()
            yield
        finally:
            self.shelf.tidy()
            self._holder = None
            self._lock.release()

    def queue(self) -> ThreadPoolExecutor:
        """The one thread that works for those who wait without one: more would only wait in it.

        Raises:
            UsageError: the stylizer is closed.
        """
        with self._lock:
            if self._closed:
                raise UsageError("the stylizer is closed; open another one with lsast.load()")
            if self._queue is None:
                self._queue = ThreadPoolExecutor(1, thread_name_prefix="lsast")
            return self._queue

    def renew(self) -> None:
        """Start anew in a forked process: neither locks nor the threads of a backend come along.

        The parent's engines are left alone for good: to take them down, even when the interpreter ends, would wait for
        threads that are not there (ONNX Runtime 1.32) or crash (OpenVINO 2026.4).
        """
        for engine in self.engines.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
        self._begin({}, opened=False)

    def close(self) -> None:
        """Wait for the painting that is at work and give memory and devices back. Closing twice is fine."""
        with self._lock:
            self._closed = True
            for engine in self.engines.values():
                engine.close()
            self.engines.clear()
            queue, self._queue = self._queue, None
        if queue:
            queue.shutdown(wait=False, cancel_futures=True)


def _renew_all() -> None:
    for workshop in list(_workshops):
        workshop.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_renew_all)
