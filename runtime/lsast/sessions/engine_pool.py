"""The open engines and styles of one process, and who may use them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import math
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from lsast_engines.backends.base import ComputeDtype, Engine
from lsast_engines.backends.choice import DtypeOrAuto, choose
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS
from lsast_engines.bundle.style import StyleFile
from lsast_engines.errors import UsageError

from .cancel import CancelToken
from .native_calls import calling_threads, native_call, require_python, user_code

T = TypeVar("T")

STYLE_MEMORY = 256 * 2**20
"""Default for the bytes of styles that are kept in memory between paintings."""

_POLL_SECONDS = 0.05
"""How often a caller that waits for the engines looks at its token and at the end of Python."""

LAPSE_SECONDS = 1.0
"""A painting whose callback takes longer loses its turn at the engines until it needs them again: the callback may wait
for a painting of another thread."""

_FORK_SECONDS = 1.0
"""How long a fork waits at most for threads that paint and for those of libraries."""

_THREADS = Path("/proc/self/task")

_log = logging.getLogger("lsast.engines")

_pools: weakref.WeakSet[EnginePool] = weakref.WeakSet()


class EnginePool:
    """Engines and styles for any number of threads. An engine serves one thread at a time, so callers take turns."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        compute_dtype: DtypeOrAuto = "auto",
        graphs: Iterable[str] = REQUIRED_GRAPHS,
        style_memory: int = STYLE_MEMORY,
    ) -> None:
        """Open `graphs`, others at their first use; errors as of `choose` and `open`, after which no engine is open."""
        self.bundle = bundle
        self.arguments = (backend, device, threads, compute_dtype, style_memory)
        """Those of `lsast.load`, for another process that opens the same."""
        self._cpu_threads, self._style_memory = threads, style_memory
        self._graphs = tuple(graphs)
        self._closed = False
        self._reset()
        with native_call():
            self.choice = found = choose(bundle, backend, device, compute_dtype)
            """What all graphs are computed with."""
            _log.info("%s on %s in %s: %s", found.backend, found.device, found.compute_dtype, found.reason)
            self._open_first()
        _pools.add(self)

    def _reset(self) -> None:
        self.engines: dict[str, Engine] = {}
        self.styles = StyleCache(self.bundle, self._style_memory)
        self._opened = False
        self._changed = threading.Condition()
        self._turn: int | None = None
        """The thread that may use the engines."""
        self._threads: set[int] = set()
        """This thread and those that wait for their turn."""
        self._callbacks: dict[int, float] = {}
        """Threads in a callback, and since when."""
        self._executor: ThreadPoolExecutor | None = None
        self._async_lapsed: Callable[[], bool] = lambda: False

    def _open_first(self) -> None:
        try:
            for name in self._graphs:
                self.engine(name)
        except BaseException:
            self._close_engines()
            raise
        self._opened = True

    def _close_engines(self) -> None:
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()

    def open(self, name: str, compute_dtype: ComputeDtype | None = None) -> Engine:
        """Open the graph `name`; `compute_dtype` replaces the chosen one. A `BundleError` where a file of the bundle
        has changed since it was opened, and the errors of `lsast_engines.backends.registry.open_engine`."""
        path, spec, choice = self.bundle.graph_path(name), self.bundle.manifest.graphs[name], self.choice
        dtype = compute_dtype or choice.compute_dtype
        self.bundle.check_unchanged()
        engine = open_engine(path, spec, choice.backend, choice.device, self._cpu_threads, dtype)
        self.bundle.check_unchanged()
        return engine

    def engine(self, name: str) -> Engine:
        """The engine of the graph `name`, for the holder of `exclusive`; opened at its first use, kept until it
        fails."""
        if name in self.engines and self.engines[name].failed:
            self.engines.pop(name).close()
        if name not in self.engines:
            self.engines[name] = self.open(name)
        return self.engines[name]

    def reopen(self, name: str, compute_dtype: ComputeDtype) -> None:
        """Replace the engine of the graph `name`, for the holder; if the new one does not open, the old one stays."""
        engine = self.engine(name)
        self.engines[name] = self.open(name, compute_dtype)
        engine.close()

    @contextlib.contextmanager
    def exclusive(self, cancel: CancelToken | None = None) -> Iterator[None]:
        """Wait until no other thread uses the engines, and keep the others waiting while the block runs. Errors as of
        `check`, and a `UsageError` where this very thread holds them."""
        self._require_other_thread()
        thread, changed = threading.get_ident(), self._changed
        self._threads.add(thread)
        try:
            self._take(thread, cancel)
            with native_call():
                if not self._opened:
                    self._open_first()
                yield
        finally:
            if changed is self._changed:  # after a fork inside the block, the child has turns of its own
                self._threads.discard(thread)
                with changed:
                    if self._turn == thread:
                        self._turn = None
                        if self._closed:
                            self._close_engines()
                    changed.notify_all()
                self.styles.evict()

    def _take(self, thread: int, cancel: CancelToken | None) -> None:
        with self._changed:
            while (turn := self._turn) is not None and turn != thread and not self._lapsed(turn):
                self._changed.wait(_POLL_SECONDS)
                self.check(cancel)
            self.check(cancel)
            self._turn = thread

    def _lapsed(self, thread: int) -> bool:
        """Whether a thread has been in a callback for so long that it may wait for another painting."""
        return time.monotonic() - self._callbacks.get(thread, math.inf) > LAPSE_SECONDS

    @contextlib.contextmanager
    def callback(self, cancel: CancelToken | None) -> Iterator[None]:
        """A block inside `exclusive` that calls a function of the user; `close` does not wait for it, and if it takes
        longer than `LAPSE_SECONDS`, others may use the engines meanwhile. Errors as of `check`, and a `UsageError`
        in a process that was forked meanwhile."""
        changed, thread = self._changed, threading.get_ident()
        with changed:
            self._callbacks[thread] = time.monotonic()
            changed.notify_all()
        try:
            with user_code():
                yield
        finally:
            self._callbacks.pop(thread, None)
        if changed is not self._changed:
            raise UsageError("found a process, forked inside on_step, that goes on with the painting of its parent")
        self._take(thread, cancel)

    def check(self, cancel: CancelToken | None) -> None:
        """Raise a `UsageError` if the stylizer is closed or Python ends, a `CancelledError` if `cancel` is set."""
        if self._closed:
            raise UsageError("the stylizer is closed; open another one with lsast.load()")
        require_python()
        if cancel:
            cancel.check()

    async def run_async(self, work: Callable[[CancelToken], T]) -> T:
        """Run `work` in the thread of async callers, and wait for it without blocking the event loop. Errors as of
        `exclusive`. When the waiting task is cancelled, work that is queued is dropped, and work that has begun is
        cancelled by its token and waited for, so that nothing goes on in the background."""
        token = CancelToken()

        def finish() -> T:
            try:
                return work(token)
            except StopIteration as error:  # no future can hold it, as no generator may raise it (PEP 479)
                raise RuntimeError("a callback raised StopIteration") from error

        try:
            while True:
                future, lapsed = self._submit(finish)
                waiting = asyncio.wrap_future(future)
                # Fetched in any case, because asyncio warns of exceptions that were not.
                waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
                while not waiting.done() and not (lapsed() and future.cancel()):
                    await asyncio.wait([waiting], timeout=LAPSE_SECONDS)
                if not future.cancelled():
                    return waiting.result()
        except asyncio.CancelledError:
            token.cancel()
            if not future.cancel():
                await asyncio.wait([waiting])
            raise

    def _submit(self, work: Callable[[], T]) -> tuple[Future[T], Callable[[], bool]]:
        """Give `work` to the one thread of async callers; more threads would only wait for the engines. Also returns a
        function that says whether the painting that runs there has lapsed: its callback may wait for `work`, which is
        then to be cancelled and submitted again, and gets a new thread."""
        self._require_other_thread()
        with self._changed:
            self.check(None)
            if self._executor is not None and self._async_lapsed():
                self._executor.shutdown(wait=False)
                self._executor = None
            if self._executor is None:
                threads: list[int] = []
                self._executor = ThreadPoolExecutor(1, "lsast", lambda: threads.append(threading.get_ident()))
                self._async_lapsed = lambda: any(map(self._lapsed, threads))
            try:
                return self._executor.submit(work), self._async_lapsed
            except RuntimeError as error:
                raise UsageError(f"found a painting while Python ends ({error})") from None

    def after_fork(self) -> None:
        """Start anew in a forked process, which inherits neither locks nor the threads of a backend. The parent's
        engines must never be freed here, not even when Python ends: that would wait for threads that do not exist
        (ONNX Runtime 1.32) or crash (OpenVINO 2026.4). An extra reference keeps them for good."""
        for engine in self.engines.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
        self._reset()

    def close(self) -> None:
        """End the painting under way and those that wait, each with `UsageError`, and free memory and devices. Waits
        for the run of a graph, never for a function of the user. Any thread and any callback may call it, also
        twice."""
        here = threading.get_ident()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._turn not in (None, here) and self._turn not in self._callbacks:
                self._changed.wait()
            if self._turn is None or self._turn in self._callbacks:
                self._close_engines()  # else this thread holds them, and closes them at its end of the turn
            executor, self._executor = self._executor, None
        if executor:
            executor.shutdown(wait=False)  # what is queued ends with UsageError

    def _require_other_thread(self) -> None:
        if threading.get_ident() in self._threads:
            raise UsageError("found a call from inside on_step; expected it after the painting, or another stylizer")


_OPEN_STYLES = 64
"""Styles that stay open between paintings: each is an open file, and macOS allows 256 of these."""


class StyleCache:
    """The open styles of a bundle, least recently used first. Any thread may open one; the engines' holder reads it."""

    def __init__(self, bundle: Bundle, budget: int) -> None:
        """`budget` bytes of keys and values are kept between paintings, one of which may need more."""
        self._bundle, self._budget = bundle, budget
        self._styles: OrderedDict[str, StyleFile] = OrderedDict()
        self._lock = threading.RLock()  # a signal handler may paint, too

    def get(self, name: str) -> StyleFile:
        """The style `name`, opened if it is not; errors as of `Bundle.open_style`."""
        with self._lock:
            if name not in self._styles:
                self._styles[name] = self._bundle.open_style(name)
            self._styles.move_to_end(name)
            return self._styles[name]

    def evict(self) -> None:
        """Drop styles, the least recently used first, until the others are within the budget, and not too many."""
        with self._lock:
            while self._styles and (self.bytes > self._budget or len(self._styles) > _OPEN_STYLES):
                self._styles.popitem(last=False)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values in memory."""
        return sum(style.bytes for style in self._styles.values())


def _before_fork() -> None:
    """Let other threads fall asleep: those of OpenVINO and OpenCV spin after their work, and a fork may copy a mutex
    that one of them holds."""
    end = time.monotonic() + _FORK_SECONDS
    while _pools and time.monotonic() < end and _other_threads_run():
        time.sleep(0.01)


def _other_threads_run() -> bool:
    """Whether another thread of this process may be in native code of ours: one of Python that paints, or one that
    Python does not know, and that runs or is ready to; True where the system does not say."""
    if not _THREADS.is_dir():
        return True
    states, calling = [], calling_threads()
    idle = {str(thread.native_id) for thread in threading.enumerate() if thread.ident not in calling}
    for thread in _THREADS.iterdir():
        if thread.name not in {*idle, str(threading.get_native_id())}:
            with contextlib.suppress(OSError):  # it has ended
                states.append((thread / "stat").read_text().rpartition(")")[2].split()[0])
    return "R" in states


def _after_fork() -> None:
    for pool in list(_pools):
        pool.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
