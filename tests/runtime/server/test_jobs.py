"""The queue alone, with a painter that paints nothing."""

import asyncio
import gc
from collections.abc import AsyncGenerator

import pytest

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: pip install '.[server]'")
pytest.importorskip("fastapi_offline", reason="fastapi-offline is not installed: pip install '.[server]'")

from starlette.types import Message

from lsast.server.app import _EventStream
from lsast.server.jobs import Job, Jobs
from lsast.server.metrics import Metrics
from lsast.server.settings import Settings
from lsast.server.worker import Event, Work

SECONDS = 5.0
"""How long a test waits for what takes no time."""


class Steps:
    """A painter whose paintings go on for as long as the test gives them steps."""

    capacity, facts, restarts, ready = 1, {}, 0, True

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    async def paint(self, work: Work) -> AsyncGenerator[Event, None]:
        yield Event("begun")
        while True:
            yield await self.events.get()

    def step(self) -> None:
        self.events.put_nowait(Event("progress", {"step": 1, "steps": 9}))


def _begin(painter: Steps) -> tuple[Jobs, Job]:
    jobs = Jobs(Settings(), painter, Metrics())  # type: ignore[arg-type]
    return jobs, jobs.submit(b"picture", b"", {}, ".png", False)


async def _state_after_cancel(jobs: Jobs, job: Job) -> str:
    await asyncio.wait_for(jobs.cancel(job), SECONDS)
    return job.state


def test_job_that_is_cancelled_before_it_runs_is_over():
    async def cancel_at_once() -> str:
        return await _state_after_cancel(*_begin(Steps()))

    assert asyncio.run(cancel_at_once()) == "cancelled"


@pytest.mark.parametrize("turns", range(8))
def test_job_that_is_cancelled_while_a_step_arrives_is_over(turns):
    async def cancel_after() -> str:
        painter = Steps()
        jobs, job = _begin(painter)
        while job.state != "painting":
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)  # it waits for the next step
        painter.step()
        for _ in range(turns):  # each turn of the loop brings the step one await nearer to the job
            await asyncio.sleep(0)
        return await _state_after_cancel(jobs, job)

    assert asyncio.run(cancel_after()) == "cancelled"


def test_drain_waits_for_what_arrives():
    async def drain() -> None:
        jobs = Jobs(Settings(), Steps(), Metrics())  # type: ignore[arg-type]
        with jobs.place():
            draining = asyncio.create_task(jobs.drain(SECONDS))
            done, _ = await asyncio.wait([draining], timeout=0.2)
            assert not done
        await draining

    asyncio.run(drain())


def test_client_that_reads_no_more_and_leaves_cancels_its_painting(monkeypatch):
    monkeypatch.setattr("lsast.server.jobs.LEAVE_SECONDS", 0.0)

    async def leave() -> str:
        painter = Steps()
        jobs, job = _begin(painter)
        blocked, left = asyncio.Event(), asyncio.Event()

        async def send(message: Message) -> None:
            if message.get("body"):  # the first event fills what the network takes
                blocked.set()
                await asyncio.Event().wait()

        async def receive() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        answer = asyncio.create_task(
            _EventStream(jobs, job)({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        )
        await asyncio.wait_for(blocked.wait(), SECONDS)
        left.set()
        await asyncio.wait_for(answer, SECONDS)
        assert job.task
        await asyncio.wait([job.task], timeout=SECONDS)
        return job.state

    gc.disable()  # which closes iterators that others forgot, at some time
    try:
        assert asyncio.run(leave()) == "cancelled"
    finally:
        gc.enable()
