"""The worker's process, seen from the server: started, spoken to, and started anew when it ends."""

import asyncio
import contextlib
import itertools
import logging
import os
import struct
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

import anyio

from lsast_engines import errors
from lsast_engines.errors import BackendError, LsastError

from .settings import Settings
from .worker import Event, Work, decode_header, encode

CANCEL_SECONDS = 10.0
"""How long a worker may take to give up a painting; then it is ended."""

MAX_PAUSE = 30.0
"""Most seconds between two starts of a worker that does not come up."""

_LENGTH = struct.Struct(">I")
_log = logging.getLogger("lsast.server")


class WorkerDiedError(LsastError):
    """The worker ended while it held a painting; another worker may finish it."""


class WorkerProcess:
    """One worker; `lsast.server.jobs.Painter`."""

    def __init__(self, settings: Settings, on_failure: Callable[[LsastError], None] = lambda error: None) -> None:
        """Remember what to start.

        Args:
            settings: of the server.
            on_failure: called if the first worker cannot open its engines.
        """
        self.capacity = 2 * settings.batch  # one batch is painted, and the next one is read meanwhile
        self.facts: Mapping[str, Any] = {}
        """What the worker said of its bundle; empty until it was ready once."""
        self.restarts = 0
        """How often a worker was started after the first."""
        self._settings = settings
        self._on_failure = on_failure
        self._ready = asyncio.Event()
        self._failed = False
        """Whether the first worker could not open its engines."""
        self._streams: dict[str, asyncio.Queue[Event | LsastError]] = {}
        self._names = (f"#{number}" for number in itertools.count())
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._cancelling: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Whether a worker has its engines open."""
        return self._ready.is_set() and not self._failed

    @property
    def pid(self) -> int | None:
        """The worker's process id; None if there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def start(self) -> None:
        """Start the worker, and see to it that there is one until `close`; returns at once."""
        self._supervisor = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """End the worker, whatever it is painting."""
        if self._supervisor:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self.kill()
        if self._process:
            await self._process.wait()
            self._process._transport.close()  # type: ignore[attr-defined]  # else it warns when it is collected

    def kill(self) -> None:
        """End the worker's process; the supervisor starts another one."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def paint(self, work: Work) -> AsyncGenerator[Event, None]:
        """Paint one picture; closing the iterator cancels the painting.

        Yields:
            Its events, the last one ``done``.

        Raises:
            WorkerDiedError: the worker ended.
            LsastError: what the worker says of the picture or of its options.
        """
        facts = {name: value for name, value in vars(work).items() if name not in ("picture", "mask")}
        async with self._stream(work.id) as stream:
            event = None
            try:
                await self._send("paint", facts, work.picture, work.mask)
                while event is None or event.kind != "done":
                    event = raised(await stream.get())
                    yield event
            except (GeneratorExit, asyncio.CancelledError):
                self._cancel(work.id)
                raise

    async def ask(self, kind: str, facts: Mapping[str, Any] | None = None, blob: bytes = b"") -> Event:
        """The answer to one of the worker's other messages, see `lsast.server.worker`.

        Raises:
            LsastError: see `paint`.
        """
        name = next(self._names)
        async with self._stream(name) as stream:
            await self._send(kind, {**(facts or {}), "id": name}, blob)
            return raised(await stream.get())

    @contextlib.asynccontextmanager
    async def _stream(self, name: str) -> AsyncIterator[asyncio.Queue[Event | LsastError]]:
        """The events of one message; waits until the worker is ready, or has failed to become so."""
        if not self._failed:
            await self._ready.wait()
        if self._failed:
            raise BackendError("the server cannot open its engines; its log says why")
        stream = self._streams[name] = asyncio.Queue()
        try:
            yield stream
        finally:
            if self._streams.get(name) is stream:
                del self._streams[name]

    async def _send(self, kind: str, facts: Mapping[str, Any], *blobs: bytes) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # the worker ended: the reader notices it
            process.stdin.write(encode(kind, facts, blobs))
            await process.stdin.drain()

    def _cancel(self, name: str) -> None:
        """Cancel a painting, and end the worker if it does not give up."""
        stream = self._streams[name] = asyncio.Queue()

        async def cancel() -> None:
            await self._send("cancel", {"id": name})
            while not isinstance(event := await stream.get(), LsastError) and event.kind not in ("done", "failed"):
                pass

        async def cancel_or_kill() -> None:
            try:
                with anyio.fail_after(CANCEL_SECONDS):
                    await cancel()
            except TimeoutError:
                _log.error("the worker does not give up a painting; starting another one")
                self.kill()
            finally:
                self._streams.pop(name, None)

        task = asyncio.create_task(cancel_or_kill())
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _supervise(self) -> None:
        pause = 0.0
        while True:
            begin = time.monotonic()
            try:
                await self._run()
            except OSError as error:  # no memory for another process, say: the next try comes
                _log.error("the worker cannot be started: %s", error.strerror)
            finally:
                self._ready.clear()
                for stream in self._streams.values():
                    stream.put_nowait(WorkerDiedError("the worker ended"))
                self._streams.clear()
            if self._failed:  # another worker would fail like the first one
                return
            pause = 0.0 if time.monotonic() - begin > MAX_PAUSE else min(2 * pause + 0.1, MAX_PAUSE)
            _log.error("the worker ended; starting another one")
            await asyncio.sleep(pause)
            self.restarts += 1

    async def _run(self) -> None:
        """One worker, from its start to its end."""
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "lsast.server.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"},
        )
        assert process.stdout is not None
        try:
            await self._send("start", {"load": self._settings.load, "limits": self._settings.worker_limits})
            with contextlib.suppress(asyncio.IncompleteReadError):
                while True:
                    header = await process.stdout.readexactly(*_LENGTH.unpack(await process.stdout.readexactly(4)))
                    kind, facts, sizes = decode_header(header)
                    (blob,) = [await process.stdout.readexactly(size) for size in sizes]
                    self._take(Event(kind, facts, blob))  # type: ignore[arg-type]
        finally:
            self.kill()
        await process.wait()

    def _take(self, event: Event) -> None:
        name = event.facts["id"]
        if name:
            if stream := self._streams.get(name):
                stream.put_nowait(event)
        elif event.kind == "done":
            self.facts = dict(event.facts)
            self._ready.set()
        elif not self.facts:
            self._failed = True
            self._ready.set()  # for those who wait
            self._on_failure(_error(event))
        else:  # the bundle was replaced, and the new one is damaged, say
            _log.error("the worker does not start: %s", event.facts["text"])


def raised(event: Event | LsastError) -> Event:
    """The event; or raised, if it is an error or tells of one."""
    if isinstance(event, LsastError):
        raise event
    if event.kind == "failed":
        raise _error(event)
    return event


def _error(event: Event) -> LsastError:
    kind = getattr(errors, event.facts["error"], BackendError)
    known = isinstance(kind, type) and issubclass(kind, LsastError) and kind is not errors.MissingExtraError
    return (kind if known else LsastError)(errors.Lines(event.facts["text"]))
