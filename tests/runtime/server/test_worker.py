"""Which paintings the worker gives to its painter together."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from lsast.server.worker import BatchPainter, Event, Task, Work, Worker
from lsast.sessions.cancel import CancelToken


class RecordingPainter:
    """Notes the ids of what it is asked to paint, waits at the first, and fails every painting."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.go = threading.Event()

    def read(self, work: Work, token: CancelToken) -> Task:
        request: Any = SimpleNamespace(batch_key=work.options["size"])
        return Task(work, request, token)

    def paint(self, tasks: Sequence[Task], send: object) -> list[Any]:
        self.groups.append([task.work.id for task in tasks])
        self.go.wait(30)
        raise RuntimeError("nothing is painted here")

    def failure(self, error: Exception) -> Event:
        return Event("failed", {"text": str(error)})


def test_worker_paints_equal_sizes_together_up_to_its_batch_and_others_alone():
    events: dict[str, list[str]] = {}
    changed = threading.Condition()

    def send(name: str, event: Event) -> None:
        with changed:
            events.setdefault(name, []).append(event.kind)
            changed.notify_all()

    def until(kind: str, names: Sequence[str]) -> None:
        with changed:
            assert changed.wait_for(lambda: all(kind in events.get(name, ()) for name in names), 30)

    painter = RecordingPainter()
    worker = Worker(painter, 2, send)  # type: ignore[arg-type]
    jobs = {"first": 1, "a": 64, "wide": 96, "b": 64, "alone": 64, "c": 64}
    for name, size in jobs.items():
        worker.take("paint", {"id": name, "options": {"size": size}, "alone": name == "alone"}, [b"", b""])
        until("read", [name])
    painter.go.set()
    until("failed", list(jobs))
    assert painter.groups == [["first"], ["a", "b"], ["wide"], ["alone"], ["c"]]


def test_painter_keeps_default_sizes_within_its_limits(split_path, png):
    limits = {"max_size": 64, "max_tile": 64, "max_tiles": 9, "max_megapixels": 1.0, "batch": 1}
    painter = BatchPainter({"bundle": str(split_path), "threads": 1}, limits)
    options = painter.read(Work("a", png, {}), CancelToken()).request.options
    assert (options.size, options.tile) == (64, 64)
