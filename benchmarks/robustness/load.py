"""Load: many threads on one stylizer give the serial bytes, and memory and descriptors stay flat.

    python -m benchmarks.robustness.load [--minutes 10] [--threads 8] [--tiny 2000] [--backend onnxruntime]

Three phases with the embedded bundle: mixed styles and options in threads; a storm of cancelled calls, of threads and
of asyncio tasks; and one thread of tiny calls. After each, one painting is compared with the first. Prints a Markdown
table; memory is the resident set in MB, first after a tenth of the phase, then at its end. Linux.
"""

import asyncio
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

import lsast

STYLES = ("vangogh", "monet", "vangogh:0.6+monet:0.4", "monet@up+roerich@0-4", "north@down")
OPTIONS: list[dict[str, Any]] = [
    {
        "style": STYLES[index % 5],
        "seed": index,
        "size": (64, 96, 128)[index % 3],
        "steps": 3,
        "solver": ("ddim", "dpmpp2m", "unipc")[index % 3],
        "guidance": (1.0, 4.0)[index % 2],
        "cache_interval": (1, 2)[index % 4 == 3],
        "keep_colour": index % 5 == 4,
        "tile": (0, 64)[index % 6 == 5],
    }
    for index in range(30)
]
PHOTO = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def _state() -> tuple[float, int, int]:
    """Resident memory in MB, open descriptors, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()


class Phase:
    """Calls until a time or a number is reached, with the state of the process early and at the end."""

    def __init__(self, done: Callable[[int], float]) -> None:
        self.done = done
        """The part of the phase that is behind after so many calls, 1 at the end."""
        self.numbers = itertools.count()
        self.early: tuple[float, int, int] | None = None
        self.calls = self.wrong = 0

    def next(self) -> int | None:
        number = next(self.numbers)
        part = self.done(number)
        if self.early is None and part >= 0.1:
            self.early = _state()
        if part >= 1:
            return None
        self.calls += 1
        return number

    def row(self, name: str) -> str:
        early, late = self.early or _state(), _state()
        held = ", ".join(f"{before:.0f} → {after:.0f}" for before, after in zip(early, late, strict=True))
        return f"| {name} | {self.calls} | {self.wrong} | {held} |"


def _timed(seconds: float) -> Callable[[int], float]:
    begin = time.monotonic()
    return lambda _: (time.monotonic() - begin) / seconds


def _mixed(stylizer: lsast.Stylizer, expected: list[np.ndarray], phase: Phase, threads: int) -> None:
    def work(_: int) -> None:
        while (number := phase.next()) is not None:
            index = number * 7 % len(OPTIONS)
            if not np.array_equal(stylizer.stylize(PHOTO, **OPTIONS[index]), expected[index]):
                phase.wrong += 1

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def _storm(stylizer: lsast.Stylizer, expected: list[np.ndarray], phase: Phase, threads: int) -> None:
    """Calls that another thread, their own callback or the event loop cancels at a random moment."""

    def work(lane: int) -> None:
        rng = random.Random(lane)
        while (number := phase.next()) is not None:
            token, index = lsast.CancelToken(), number % len(OPTIONS)
            timer = threading.Timer(rng.uniform(0, 0.2), token.cancel)
            timer.start()
            try:
                if not np.array_equal(stylizer.stylize(PHOTO, **OPTIONS[index], cancel=token), expected[index]):
                    phase.wrong += 1
            except lsast.CancelledError:
                pass
            timer.cancel()

    async def tasks() -> None:
        rng = random.Random(-1)
        while (number := phase.next()) is not None:
            index = number % len(OPTIONS)
            calls = [asyncio.create_task(stylizer.stylize_async(PHOTO, **OPTIONS[index])) for _ in range(3)]
            await asyncio.sleep(rng.uniform(0, 0.2))
            for call in calls[1:]:
                call.cancel()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, lsast.Result):
                    phase.wrong += not np.array_equal(outcome, expected[index])
                else:
                    phase.wrong += not isinstance(outcome, asyncio.CancelledError)

    with ThreadPoolExecutor(threads) as pool:
        lanes = [pool.submit(work, lane) for lane in range(threads - 1)]
        asyncio.run(tasks())
        for lane in lanes:
            lane.result()


def _tiny(stylizer: lsast.Stylizer, expected: list[np.ndarray], phase: Phase, threads: int) -> None:
    small = [stylizer.stylize(PHOTO[:8, :8], size=0, steps=1, seed=seed) for seed in range(4)]
    while (number := phase.next()) is not None:
        if not np.array_equal(stylizer.stylize(PHOTO[:8, :8], size=0, steps=1, seed=number % 4), small[number % 4]):
            phase.wrong += 1


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="Of mixed calls; a fifth as long a storm of cancels.")
@click.option("--threads", default=8, show_default=True)
@click.option("--tiny", default=2000, show_default=True, help="Tiny calls.")
@click.option("--backend", default="onnxruntime", show_default=True)
def main(minutes: float, threads: int, tiny: int, backend: str) -> None:
    """Paint in many threads at once and compare with serial paintings."""
    with lsast.load(backend=backend, threads=1) as stylizer:
        expected = [np.asarray(stylizer.stylize(PHOTO, **options)) for options in OPTIONS]
        phases = [
            (f"{threads} threads, mixed", _mixed, lambda: _timed(60 * minutes)),
            ("cancel storm", _storm, lambda: _timed(12 * minutes)),
            ("tiny calls", _tiny, lambda: lambda number: number / tiny),
        ]
        wrong = 0
        print("| phase | calls | wrong | memory in MB, descriptors, threads |\n|---|---|---|---|", flush=True)
        for name, run, limit in phases:
            phase = Phase(limit())
            run(stylizer, expected, phase, threads)
            phase.wrong += not np.array_equal(stylizer.stylize(PHOTO, **OPTIONS[0]), expected[0])
            print(phase.row(name), flush=True)
            wrong += phase.wrong
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
