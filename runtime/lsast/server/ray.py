"""The same application on Ray Serve, for many machines: `serve run lsast.server.ray:app`.

One deployment answers HTTP and keeps the jobs. Another one paints, in as many replicas as Ray thinks right, each a
process with an open `Stylizer`; Ray spreads the paintings, forms the batches, and replaces replicas that die. The
settings are those of `lsast-serve`, by the environment of `serve run`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError

from ..sessions.cancel import CancelToken
from .app import create_app
from .process import WorkerDiedError, raised
from .settings import Settings
from .worker import BatchPainter, Event, Task, Work

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

READY_POLL_SECONDS = 0.5
"""Pause between two looks whether a replica is ready."""

Entry = tuple[Task, "asyncio.Queue[Event]"]
"""A task, and where its events go."""


class Replica:
    """Paints; one process of Ray."""

    def __init__(self, settings: Settings) -> None:
        """Open the engines.

        Raises:
            LsastError: see `lsast.load`.
        """
        self._painter = BatchPainter(settings.load, settings.worker_limits)
        self._paint_batch.set_max_batch_size(settings.batch)

    async def paint(self, work: Work) -> AsyncGenerator[Event, None]:
        """The events of one painting, the last one ``done`` or ``failed``; cancelling the request cancels it."""
        token, events = CancelToken(), asyncio.Queue[Event]()
        painting: asyncio.Future[Event] | None = None
        try:
            yield Event("reading")
            try:
                task = await asyncio.to_thread(self._painter.read, work, token)
            except Exception as error:
                yield self._painter.failure(error)
                return
            yield Event("read")
            painting = asyncio.ensure_future(self._paint_batch((task, events)))
            while not painting.done():
                event = asyncio.ensure_future(events.get())
                await asyncio.wait([painting, event], return_when=asyncio.FIRST_COMPLETED)
                if event.done():
                    yield event.result()
                else:
                    event.cancel()
            yield painting.result()
        finally:
            token.cancel()

    async def ask(self, kind: str, facts: Mapping[str, Any], blob: bytes) -> Event:
        """The answer to another message of the worker's protocol."""
        return await asyncio.to_thread(self._painter.answer, kind, facts, blob)

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.02)  # type: ignore[untyped-decorator]
    async def _paint_batch(self, entries: list[Entry]) -> list[Event]:
        """Paint what Ray has put together: those of one size at once, the others after one another."""
        groups: dict[Any, list[Entry]] = {}
        for entry in entries:
            task = entry[0]
            groups.setdefault(task if task.work.alone else task.request.batch_key, []).append(entry)
        ended: dict[str, Event] = {}
        for group in groups.values():
            ended |= await self._paint_group(group)
        return [ended[task.work.id] for task, _ in entries]

    async def _paint_group(self, entries: list[Entry]) -> dict[str, Event]:
        loop, queues = asyncio.get_running_loop(), {task.work.id: events for task, events in entries}
        tasks = [task for task, _ in entries]

        def emit(name: str, event: Event) -> None:
            loop.call_soon_threadsafe(queues[name].put_nowait, event)

        try:
            results = await asyncio.to_thread(self._painter.paint, tasks, emit)
        except Exception as error:
            return {task.work.id: self._painter.failure(error) for task in tasks}
        finished = [
            asyncio.to_thread(self._painter.finish, task, result) for task, result in zip(tasks, results, strict=True)
        ]
        return dict(zip(queues, await asyncio.gather(*finished), strict=True))


class Replicas:
    """All replicas, seen from the deployment that answers HTTP; `lsast.server.jobs.Painter`."""

    def __init__(self, settings: Settings, handle: DeploymentHandle[Replica]) -> None:
        self.capacity = settings.queue  # Ray's own queues bound what a replica takes
        self.facts: Mapping[str, Any] = {}
        self.restarts = 0
        self._handle = handle
        self._starting: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether a replica has answered."""
        return bool(self.facts)

    def start(self) -> None:
        """Wait for the first replica, in the background."""
        self._starting = asyncio.create_task(self._wait())

    async def close(self) -> None:
        """Stop waiting; Ray ends the replicas."""
        if self._starting:
            self._starting.cancel()

    async def paint(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `WorkerProcess.paint`."""
        events = self._handle.options(stream=True).paint.remote(work)
        over = False
        try:
            async for event in events:
                over = event.kind in ("done", "failed")
                yield raised(event)
            if not over:
                raise WorkerDiedError("the replica ended")
        except RayActorError:
            self.restarts += 1
            over = True
            raise WorkerDiedError("the replica ended") from None
        finally:
            if not over:
                events.cancel()

    async def ask(self, kind: str, facts: Mapping[str, Any] | None = None, blob: bytes = b"") -> Event:
        """See `WorkerProcess.ask`."""
        try:
            return raised(await self._handle.ask.remote(kind, facts or {}, blob))
        except RayActorError:
            raise WorkerDiedError("the replica ended") from None

    async def _wait(self) -> None:
        while not self.facts:
            with contextlib.suppress(RayActorError, RayTaskError, TaskCancelledError, WorkerDiedError):
                self.facts = (await self.ask("facts")).facts
            await asyncio.sleep(READY_POLL_SECONDS)


def make_app(settings: Settings, **options: Any) -> Application:
    """The application for `serve.run`.

    Args:
        settings: of the server; host and port are Ray's own (`serve.start`).
        options: of the deployment that paints, see `ray.serve.deployment`, such as `num_replicas`.
    """

    def build() -> FastAPI:  # evaluated where HTTP is answered
        def replicas() -> Replicas:
            name = serve.get_replica_context().app_name
            return Replicas(settings, serve.get_deployment_handle(Replica.__name__, app_name=name))

        return create_app(settings, replicas)

    if "num_replicas" not in options:
        scaling = {"min_replicas": 1, "max_replicas": 16, "target_ongoing_requests": 2 * settings.batch}
        options = {"autoscaling_config": scaling, **options}
    cpus = {"num_cpus": max(1, settings.threads)}
    painter = serve.deployment(
        Replica, max_ongoing_requests=4 * settings.batch, ray_actor_options=cpus, **options
    ).bind(settings)
    gate = serve.deployment(
        serve.ingress(build)(), name="Http", max_ongoing_requests=4 * settings.queue, ray_actor_options={"num_cpus": 0}
    )
    return gate.bind(painter)


app = make_app(Settings.from_environment())
"""What `serve run` runs."""
