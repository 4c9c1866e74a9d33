"""Jobs: paintings from the moment they are accepted until their clients have them."""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import anyio

from lsast_engines.errors import BackendError, LsastError

from .metrics import Metrics
from .process import WorkerDiedError
from .schemas import Painting, State
from .settings import Settings
from .worker import Event, Work

ATTEMPTS = 3
"""How many workers may end over a painting before it is given up; from the second on it is painted alone."""

LEAVE_SECONDS = 5.0
"""How long a job goes on after the last client that followed its events has gone away, and how long a closing server
waits for a client to fetch a job that has ended."""

_log = logging.getLogger("lsast.server")


class Painter(Protocol):
    """What paints: a worker process, or the replicas of Ray Serve."""

    capacity: int
    """How many paintings it takes at once."""
    facts: Mapping[str, Any]
    """See `BatchPainter.facts`; empty until it was ready once."""
    restarts: int
    """How often a worker had to be started anew."""

    @property
    def ready(self) -> bool:
        """Whether it would begin a painting at once."""

    def start(self) -> None:
        """Begin to get ready."""

    async def close(self) -> None:
        """End."""

    def paint(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `WorkerProcess.paint`."""

    async def ask(self, kind: str, facts: Mapping[str, Any] | None = None, blob: bytes = b"") -> Event:
        """See `WorkerProcess.ask`."""


class QueueFullError(LsastError):
    """No room for another painting; `seconds` is when to try again."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(
            f"found {waiting} paintings waiting, the most that this server takes; try again in {seconds} s"
        )
        self.seconds = seconds


class TooSlowError(LsastError):
    """A painting took longer than the server allows."""


@dataclass(eq=False)
class Job:
    """One painting of the queue."""

    work: Work
    state: State = "queued"
    taken: bool = False
    """Whether the painter has it, which reads it before its turn at the engines comes."""
    step: int = 0
    steps: int = 0
    preview: bytes = field(default=b"", repr=False)
    painting: bytes = field(default=b"", repr=False)
    """The file, when done."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of the painting, when done."""
    error: LsastError | None = None
    accepted: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    ended: float = 0.0
    fetched: bool = False
    """Whether a client has got the painting, or the news that there is none."""
    watchers: int = 0
    """Clients that follow its events."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the next change; then there is another one."""
    task: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ("done", "failed", "cancelled")

    def change(self) -> None:
        """Tell all who wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


class Jobs:
    """All jobs of a server, in the order in which they came."""

    def __init__(self, settings: Settings, painter: Painter, metrics: Metrics) -> None:
        self._settings = settings
        self._painter = painter
        self._metrics = metrics
        self._jobs: dict[str, Job] = {}
        self._arriving = 0
        self._turns = asyncio.Semaphore(painter.capacity)
        self._seconds = 2.0
        """Moving mean of the time between two paintings that end while others wait."""
        self._last_end = 0.0
        metrics.watch(
            queued=lambda: self._count("queued"),
            painting=lambda: self._count("painting"),
            kept_bytes=lambda: sum(len(job.painting) for job in self._jobs.values()),
            worker_ready=lambda: float(painter.ready),
            worker_restarts=lambda: float(painter.restarts),
        )

    def get(self, name: str) -> Job | None:
        """The job of that id, if it is there still."""
        return self._jobs.get(name)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue while a request arrives, so that what arrives is bounded, too.

        Raises:
            QueueFullError: there is none.
        """
        waiting = sum(not job.taken and not job.over for job in self._jobs.values()) + self._arriving
        if waiting >= self._settings.queue:
            self._metrics.refused.inc()
            raise QueueFullError(waiting, max(1, math.ceil(self._seconds * waiting / 2)))
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def submit(self, picture: bytes, mask: bytes, options: Mapping[str, Any], suffix: str, previews: bool) -> Job:
        """Accept a painting; it begins when its turn comes."""
        job = Job(Work(secrets.token_urlsafe(12), picture, options, mask, suffix, previews))
        self._jobs[job.work.id] = job
        job.task = asyncio.create_task(self._run(job))
        return job

    async def cancel(self, job: Job) -> None:
        """End a job; returns when it has ended."""
        if job.task and not job.over:
            job.task.cancel()
            await asyncio.wait([job.task])
            if not job.over:  # its task had not begun
                self._end(job, "cancelled")

    def forget(self, job: Job) -> None:
        """Drop a job that is over."""
        self._jobs.pop(job.work.id, None)

    @contextlib.contextmanager
    def following(self, job: Job) -> Iterator[None]:
        """Follow a job while the block runs.

        When the last follower leaves a job that is not over, it is cancelled after `LEAVE_SECONDS`.
        """
        job.watchers += 1
        try:
            yield
        finally:
            job.watchers -= 1
            if not job.watchers and not job.over:
                asyncio.get_running_loop().call_later(LEAVE_SECONDS, self._leave, job)

    def snapshot(self, job: Job) -> Painting:
        """What the API says of a job."""
        now = time.monotonic()
        left = (now - job.begun) / job.step * (job.steps - job.step) if job.state == "painting" and job.step else None
        before = [other for other in self._jobs.values() if other.state == "queued" and other.accepted < job.accepted]
        return Painting(
            id=job.work.id,
            state=job.state,
            position=len(before) if job.state == "queued" else None,
            step=job.step,
            steps=job.steps,
            seconds_left=None if left is None else round(left, 1),
            error=str(job.error) if job.error else None,
            **job.facts,
        )

    async def drain(self, seconds: float, give_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until what arrives is here, every job over and with its client, at most so many seconds, or until
        `give_up`."""
        end = time.monotonic() + seconds
        while (
            (now := time.monotonic()) < end
            and not give_up()
            and (
                self._arriving
                or any(
                    not job.over or (not job.fetched and now - job.ended < LEAVE_SECONDS) for job in self._jobs.values()
                )
            )
        ):
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Cancel what is not over."""
        await asyncio.gather(*(self.cancel(job) for job in list(self._jobs.values())))

    def _count(self, state: State) -> int:
        return sum(job.state == state for job in self._jobs.values())

    def _leave(self, job: Job) -> None:
        if not job.watchers and not job.over and job.task:
            job.task.cancel()

    async def _run(self, job: Job) -> None:
        try:
            async with self._turns:
                job.taken = True
                await self._paint(job)
            self._end(job, "done")
        except asyncio.CancelledError:
            self._end(job, "cancelled")
        except LsastError as error:
            job.error = error
            self._end(job, "failed")
        except Exception as error:
            _log.error("unexpected error", exc_info=error)
            job.error = BackendError("unexpected error")
            self._end(job, "failed")

    def _end(self, job: Job, state: State) -> None:
        now = time.monotonic()
        if job.begun and self._count("queued"):
            self._seconds += 0.1 * (now - max(job.begun, self._last_end) - self._seconds)
        job.state = state
        self._last_end = job.ended = now
        job.work = replace(job.work, picture=b"", mask=b"")
        job.preview = b""
        self._metrics.ended.labels(state).inc()
        job.change()
        # By its id, so that a job that is forgotten before keeps no memory until then.
        asyncio.get_running_loop().call_later(self._settings.keep_seconds, self._jobs.pop, job.work.id, None)
        over = sorted((other for other in self._jobs.values() if other.over), key=lambda other: other.ended)
        kept = sum(len(other.painting) for other in over)
        for oldest in over:
            if kept <= self._settings.keep_bytes:
                break
            kept -= len(oldest.painting)
            self.forget(oldest)

    async def _paint(self, job: Job) -> None:
        self._metrics.waited.observe(time.monotonic() - job.accepted)
        deaths = 0
        while True:
            begun = False
            try:
                async with contextlib.aclosing(self._painter.paint(job.work)) as events:
                    async for event in self._in_time(events):
                        begun = True
                        self._take(job, event)
                self._metrics.painted.observe(time.monotonic() - job.begun)
                return
            except WorkerDiedError:
                job.state, job.step, deaths = "queued", 0, deaths + begun
                job.change()
                job.work = replace(job.work, alone=deaths > 0)
                if deaths == ATTEMPTS:
                    raise BackendError(f"{deaths} workers ended while they painted this; the log says more") from None

    async def _in_time(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The events; the time from ``reading`` to ``read``, and from ``begun`` to ``done``, is limited."""
        end: float | None = None
        iterator = aiter(events)
        while True:
            limit = None if end is None else end - time.monotonic()
            try:
                with anyio.fail_after(limit):  # asyncio.wait_for loses a cancellation that comes with the event
                    event = await anext(iterator)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise TooSlowError(
                    f"the painting took more than {self._settings.seconds:g} s, the most that this server allows; take "
                    "a smaller size or fewer steps"
                ) from None
            if event.kind in ("reading", "begun"):
                end = time.monotonic() + self._settings.seconds
            elif event.kind == "read":
                end = None
            yield event

    def _take(self, job: Job, event: Event) -> None:
        if event.kind == "begun":
            job.state, job.begun = "painting", time.monotonic()
        elif event.kind == "progress":
            job.step, job.steps = event.facts["step"], event.facts["steps"]
            job.preview = event.blob or job.preview
        elif event.kind == "done":
            job.painting, job.facts = event.blob, {name: event.facts[name] for name in ("options", "seconds", "size")}
            return  # `_run` tells
        job.change()
