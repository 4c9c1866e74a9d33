"""Starts the processes of `worker` and makes rows of what they report."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lsast_engines.errors import BackendError

from .configurations import Configuration, Summary

Row = dict[str, Any]
Progress = Callable[[str], None]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What NumPy's BLAS reads when it is loaded."""


def run_worker(name: str, task: Mapping[str, Any], threads: int | None = None) -> Row:
    """Do a task of `worker` in a process of its own; stderr goes through.

    Raises:
        BackendError: the process ended without a report, or with an error; the message says which.
    """
    folders = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    if threads is not None:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    command = [sys.executable, "-m", "benchmarks.bench.worker", name]
    done = subprocess.run(command, input=json.dumps(task), stdout=subprocess.PIPE, env=environment, text=True)
    if done.returncode:
        raise BackendError(f"the process that measures {name} ended with status {done.returncode}; see above")
    report: Row = json.loads(done.stdout)
    if "error" in report:
        raise BackendError(report["error"])
    return report


def measure(
    configuration: Configuration, task: Mapping[str, Any], *, cold: bool, progress: Progress = lambda line: None
) -> Row:
    """Measure one configuration.

    Args:
        configuration: what.
        task: `bundle`, `picture` (a path), `threads` and `repeats`.
        cold: whether also in a new process for every repeat; batches are not.
        progress: told what is about to be done.

    Returns:
        A row; one with an `error` if this machine cannot do it.
    """
    row: Row = {"name": configuration.name, **vars(configuration), "warm": None, "cold": None, "error": None}
    task = {**vars(configuration), **task}
    try:
        progress(f"{configuration.name}: warm")
        row["warm"] = warm_figures(run_worker("warm", task, task["threads"]), configuration.batch)
        if cold and configuration.batch == 1:
            reports = []
            for repeat in range(task["repeats"]):
                progress(f"{configuration.name}: cold, {repeat + 1} of {task['repeats']}")
                spawned = time.time()
                report = run_worker("cold", {**task, "spawned": spawned}, task["threads"])
                reports.append({**report, "spawned": spawned, "ended": time.time()})
            row["cold"] = cold_figures(reports)
    except BackendError as error:
        row["error"] = str(error)
    return row


def warm_figures(report: Row, batch: int) -> Row:
    """Figures of a ``warm`` report: seconds of phases are of a picture, those of graphs of one run."""
    repeats: list[Row] = report["repeats"]
    first = repeats[0]
    graphs = {}
    for name, groups in first["graphs"].items():
        runs = [seconds for repeat in repeats for group in repeat["graphs"][name] for seconds in group["seconds"]]
        shapes = [{"shapes": group["shapes"], "runs": len(group["seconds"])} for group in groups]
        # A row of a batch shares its runs with the others.
        total = [sum(sum(group["seconds"]) for group in repeat["graphs"][name]) / batch for repeat in repeats]
        graphs[name] = {
            "path": report["paths"][name],
            "shapes": shapes,
            "run": Summary.of(runs).as_json(),
            "picture": Summary.of(total).as_json(),
        }
    steps = [seconds for repeat in repeats for seconds in repeat["steps"]]
    return {
        "open_s": report["open"],
        "first_s": report["first"],
        "picture": Summary.of([repeat["total"] / batch for repeat in repeats]).as_json(),
        "phases": {
            name: Summary.of([repeat["phases"][name] / batch for repeat in repeats]).as_json()
            for name in first["phases"]
        },
        "step": Summary.of(steps).as_json() if steps else None,
        "graphs": graphs,
        "painted": first["painted"],
        "options": first["options"],
        "storage_dtype": report["storage_dtype"],
        "choice": report["choice"],
        "peak_mb": megabytes(report["peak_bytes"]),
        "cpu_s": report["cpu_s"],
    }


def cold_figures(reports: Sequence[Row]) -> Row:
    """Figures of ``cold`` reports, each with the times when the process was `spawned` and when it had `ended`."""
    totals = [report["ended"] - report["spawned"] for report in reports]
    parts: dict[str, list[float]] = {}
    for report in reports:
        for name, seconds in cold_parts(report).items():
            parts.setdefault(name, []).append(seconds)
    total = Summary.of(totals)
    peaks = [report["peak_bytes"] for report in reports if report["peak_bytes"] is not None]
    return {
        "total": total.as_json(),
        "cpu": Summary.of([report["cpu_s"] for report in reports]).as_json(),
        "parts": {
            name: {**Summary.of(seconds).as_json(), "share": Summary.of(seconds).median / total.median}
            for name, seconds in parts.items()
        },
        "peak_mb": megabytes(max(peaks)) if peaks else None,
    }


def cold_parts(report: Row) -> dict[str, float]:
    """Seconds of every part of one cold start; ``rest`` is the time when none of them ran."""
    intervals: list[tuple[str, float, float]] = [
        *((name, begin, end) for name, begin, end in report["parts"]),
        ("exit", report["done"], report["ended"]),
    ]
    parts: dict[str, float] = {}
    for name, begin, end in intervals:
        parts[name] = parts.get(name, 0.0) + end - begin
    phases = report["phases"]
    inner = {
        "read the picture": phases["read"],
        "find edges": phases["edges"]
        - parts.get("controlnet_cond: first run", 0.0)
        - parts.get("controlnet_cond: further runs", 0.0),
        "finish": phases["finish"],
    }
    rest = report["ended"] - report["spawned"] - covered((begin, end) for _, begin, end in intervals)
    return {**parts, **inner, "rest": rest - sum(inner.values())}


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How much of a line is covered by intervals that may overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def add_macs(rows: Iterable[Row], rates: Mapping[str, Mapping[str, float]], threads: int | None = None) -> None:
    """Write into every row what its graphs ask for, and which part of the machine's limit they reach.

    Args:
        rows: of `measure`.
        rates: of `peak_flops.peak_flops`.
        threads: see `run_worker`.

    Raises:
        BackendError: graphs cannot be counted, for want of OpenVINO; the message says how to mend.
    """
    rows = [row for row in rows if row["warm"]]
    wanted: dict[str, list[Any]] = {}
    for row in rows:
        for graph in row["warm"]["graphs"].values():
            known = wanted.setdefault(graph["path"], [])
            known += [group["shapes"] for group in graph["shapes"] if group["shapes"] not in known]
    counted = run_worker("macs", {"graphs": wanted}, threads)["macs"]
    for row in rows:
        # What a bundle with activations in 8 bits multiplies is in 8 bits, whatever the rest is computed in.
        kind = "int8" if row["warm"]["storage_dtype"] == "int8" else row["warm"]["choice"]["compute_dtype"]
        best = best_rate(rates, kind)
        row["warm"]["limit"] = kind
        picture = 0.0
        for graph in row["warm"]["graphs"].values():
            shapes = wanted[graph["path"]]
            counts = counted[graph["path"]]
            total = sum(group["runs"] * counts[shapes.index(group["shapes"])] for group in graph["shapes"])
            runs = sum(group["runs"] for group in graph["shapes"])
            graph["gmac"] = total / runs / 1e9
            seconds = graph["picture"]["median"] * row["batch"]
            graph["fraction"] = None if best is None else total / 1e9 / seconds / best
            picture += total / row["batch"] / 1e9
        row["warm"]["gmac"] = picture
        row["warm"]["fraction"] = None if best is None else picture / row["warm"]["picture"]["median"] / best


def best_rate(rates: Mapping[str, Mapping[str, float]], compute_dtype: str) -> float | None:
    """The best of `rates` in a compute dtype, in 10⁹ multiply-accumulates a second; None if nothing computes in it."""
    return max(rates.get(compute_dtype, {}).values(), default=None)


def megabytes(count: int | None) -> float | None:
    """Bytes as MB."""
    return None if count is None else count / 1e6


def write_test_picture(path: Path, side: int) -> None:
    """A picture of side x side pixels that needs no file: slopes, edges of all directions, and grain."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.sin(2 * np.pi * np.stack([3 * x + y, 5 * y - x, 2 * x * y], axis=-1))
    rings = (np.hypot(x - 0.5, y - 0.4) * 8 % 1 < 0.5)[:, :, None]
    grain = np.random.default_rng(0).uniform(-0.05, 0.05, (side, side, 3))
    levels = 0.5 + 0.25 * waves + np.where(rings, 0.15, -0.15) + grain
    Image.fromarray(np.round(255 * levels.clip(0, 1)).astype(np.uint8)).save(path)
