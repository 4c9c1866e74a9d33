"""What one process of the bench measures: ``python -m bench.worker TASK`` with JSON on stdin and stdout.

Every measurement has a process of its own, so that peaks of memory and what was loaded before are its own. Tasks:

- ``warm``: open a bundle, paint a picture (or a batch) once, then again and again;
- ``cold``: open a bundle, paint a picture and save it, once, with the time of every part;
- ``peak_flops``: see `peak_flops`;
- ``macs``: see `macs`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

BEGIN = time.time()
"""When Python had started; the clock is one that all processes share."""

if TYPE_CHECKING:
    from lsast.stylizer import Stylizer
    from lsast_engines.backends.base import Array, ComputeDtype, Engine, Feeds
    from lsast_engines.bundle.bundle import Bundle

Report = dict[str, Any]


class Intervals:
    """Intervals of named parts, on the clock of `BEGIN`; parts of several threads may run side by side."""

    def __init__(self) -> None:
        self.intervals: list[tuple[str, float, float]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block."""
        begin = time.time()
        yield
        self.intervals.append((name, begin, time.time()))


class TimedEngine:
    """An engine that notes how long every run takes, and the shapes that it ran on. See `Engine`."""

    spec: Any
    backend: str
    device: str
    compute_dtype: ComputeDtype

    def __init__(self, engine: Engine, parts: Intervals) -> None:
        self._engine = engine
        self._parts = parts
        self._bound: dict[str, list[int]] = {}
        self.calls: list[tuple[float, dict[str, list[int]]]] = []
        """Seconds and input shapes of every run."""

    def bind_inputs(self, feeds: Feeds) -> None:
        """See `Engine.bind_inputs`."""
        self._bound |= {name: list(value.shape) for name, value in feeds.items()}
        self._engine.bind_inputs(feeds)

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """See `Engine.__call__`."""
        name = self._engine.spec.name
        begin = time.perf_counter()
        with self._parts(f"{name}: {'further runs' if self.calls else 'first run'}"):
            outputs = self._engine(feeds)
        shapes = self._bound | {name: list(value.shape) for name, value in feeds.items()}
        self.calls.append((time.perf_counter() - begin, shapes))
        return outputs

    def release_memory(self) -> None:
        """See `Engine.release_memory`."""
        self._engine.release_memory()

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def opened(bundle: Bundle, task: Mapping[str, Any], parts: Intervals) -> tuple[Stylizer, dict[str, TimedEngine]]:
    """A stylizer on timed engines, and those, filled as they are opened."""
    from lsast.sessions.engine_pool import EnginePool
    from lsast.stylizer import Stylizer, first_graphs

    engines: dict[str, TimedEngine] = {}

    class TimedPool(EnginePool):
        def open(self, name: str, compute_dtype: ComputeDtype | None = None) -> Engine:
            with parts(f"open {name}"):
                engine = super().open(name, compute_dtype)
            engines[name] = TimedEngine(engine, parts)
            return engines[name]

    where = (task["backend"], "cpu", task["threads"], task["compute_dtype"])
    return Stylizer(TimedPool(bundle, *where, first_graphs(bundle, keywords(task)))), engines


def keywords(task: Mapping[str, Any]) -> dict[str, Any]:
    """What `Stylizer.stylize` is given for a task."""
    return {"preset": task["preset"], **task["options"], "size": task["size"]}


def warm(task: Mapping[str, Any]) -> Report:
    """See the module; each repeat tells what it took, and where none is asked for, the first picture does."""
    from lsast_engines.bundle.bundle import Bundle, find_bundle

    parts = Intervals()
    begin = time.perf_counter()
    bundle = Bundle.open(find_bundle(task["bundle"]))
    stylizer, engines = opened(bundle, task, parts)
    opening = time.perf_counter() - begin
    given, batch = keywords(task), task["batch"]

    def paint() -> Report:
        for engine in engines.values():
            engine.calls.clear()
        ticks: list[float] = []
        begin = time.perf_counter()
        if batch == 1:
            results = [stylizer.stylize(task["picture"], **given, on_step=lambda *_: ticks.append(time.perf_counter()))]
        else:
            results = list(stylizer.stylize_many([task["picture"]] * batch, batch=batch, **given))
        total = time.perf_counter() - begin
        first = results[0]
        assert first.provenance is not None, "paintings of a stylizer have one"
        return {
            "total": total,
            "phases": {name: sum(result.seconds[name] for result in results) for name in first.seconds},
            "steps": [later - earlier for earlier, later in pairwise(ticks)],
            "graphs": {name: gathered(engine.calls) for name, engine in engines.items() if engine.calls},
            "painted": first.provenance.painted,
            "options": asdict(first.options),
        }

    with stylizer:
        first = paint()
        repeats = [paint() for _ in range(task["repeats"])] or [first]
    paths = {name: str(bundle.graph_path(name)) for name in first["graphs"]}
    report = {"open": opening, "first": first["total"], "repeats": repeats, "paths": paths}
    return {**report, "storage_dtype": bundle.manifest.storage_dtype, "choice": asdict(stylizer.choice)}


def gathered(calls: list[tuple[float, dict[str, list[int]]]]) -> list[Report]:
    """Runs of a graph, those of equal shapes together."""
    found: dict[str, Report] = {}
    for seconds, shapes in calls:
        found.setdefault(json.dumps(shapes), {"shapes": shapes, "seconds": []})["seconds"].append(seconds)
    return list(found.values())


def cold(task: Mapping[str, Any]) -> Report:
    """See the module; `task` says when it was `spawned`, on the clock of `BEGIN`."""
    parts = Intervals()
    parts.intervals.append(("interpreter", task["spawned"], BEGIN))
    with parts("imports"):
        from lsast import stylizer  # noqa: F401 - what lsast-run imports before it opens anything
        from lsast.cli import run  # noqa: F401 - imported by lsast-run as well
        from lsast_engines.backends.choice import choose
        from lsast_engines.bundle.bundle import Bundle, find_bundle
    with parts("open bundle"):
        bundle = Bundle.open(find_bundle(task["bundle"]))
    with parts(f"import {task['backend']}"):
        choose(bundle, task["backend"], "cpu", task["compute_dtype"])
    with tempfile.TemporaryDirectory(prefix="lsast-bench-") as folder:
        made, _ = opened(bundle, task, parts)
        with made:
            result = made.stylize(task["picture"], **keywords(task))
            with parts("save"):
                result.save(Path(folder) / "out.png")
    return {"parts": parts.intervals, "phases": result.seconds, "done": time.time()}


def measure_peak_flops(task: Mapping[str, Any]) -> Report:
    """See `peak_flops.peak_flops`."""
    from .peak_flops import peak_flops

    return {"gmacs": peak_flops(**task)}


def measure_macs(task: Mapping[str, Any]) -> Report:
    """Counts by graph; see `macs.count_macs`."""
    from .macs import count_macs

    return {"macs": {path: count_macs(Path(path), shapes) for path, shapes in task["graphs"].items()}}


TASKS: dict[str, Callable[[Mapping[str, Any]], Report]] = {
    "warm": warm,
    "cold": cold,
    "peak_flops": measure_peak_flops,
    "macs": measure_macs,
}


def main(name: str) -> None:
    """Do a task and print its report, or what was wrong as ``{"error": …}``."""
    task = json.load(sys.stdin)
    try:
        report = TASKS[name](task)
    except Exception as error:
        # Not before: it imports what a cold start is to be told of.
        from lsast_engines.errors import LsastError

        if not isinstance(error, LsastError):
            raise
        report = {"error": str(error)}
    from lsast_engines.environment import peak_memory

    times = os.times()
    report |= {"cpu_s": times.user + times.system, "peak_bytes": peak_memory()}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
