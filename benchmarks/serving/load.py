"""A load test of `lsast-serve` on this machine, beside one `Stylizer` in a loop.

    python -m benchmarks.serving.load PICTURE [--requests 1000] [--concurrency 32] [--size 64] [--steps 2]

First, pictures a minute of a `Stylizer` in a loop (before and after), and of a server between. Then the requests
of a bad day: several sizes and formats, files that are no pictures, clients that leave, jobs, a queue that is too
short, and the worker killed twice. Every accepted request must be answered or cancelled. Prints a Markdown table.
"""

import asyncio
import collections
import contextlib
import io
import itertools
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
from PIL import Image

import lsast
from benchmarks.bench.machine import describe

SIZES = ((640, 448), (448, 640), (512, 512), (320, 240))


def files(picture: Path) -> list[bytes]:
    """Good files of several sizes and formats."""
    found = []
    with Image.open(picture) as image:
        for size, form in itertools.product(SIZES, ("JPEG", "PNG", "WEBP")):
            handle = io.BytesIO()
            image.convert("RGB").resize(size).save(handle, form)
            found.append(handle.getvalue())
    return found


@contextlib.contextmanager
def serving(*options: str) -> Iterator[tuple[int, str]]:
    """A server's process id and address."""
    command = [sys.executable, "-m", "lsast.server.cli", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            while httpx.get(address + "/readyz").status_code != 200:
                time.sleep(0.1)
            yield process.pid, address
        finally:
            process.send_signal(signal.SIGTERM)


def worker_of(server: int) -> int | None:
    """The process id of the worker."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return int(children[0]) if children else None


def memory(*processes: int | None) -> float:
    """Resident memory of processes, in MB."""
    found = 0
    for process in filter(None, processes):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process}/status").read_text()
            found += int((re.search(r"VmRSS:\s+(\d+)", text) or ["", "0"])[1])
    return found / 1024


def loop_rate(pictures: list[bytes], count: int, options: dict[str, Any]) -> float:
    """Pictures a minute of one `Stylizer` that reads, paints and writes one after another."""
    with lsast.load() as stylizer:
        stylizer.stylize(pictures[0], **options)
        begin = time.perf_counter()
        for index in range(count):
            stylizer.stylize(pictures[index % len(pictures)], seed=index, **options).write(io.BytesIO(), ".png")
        return 60 * count / (time.perf_counter() - begin)


class Load:
    """Clients of one server, and what became of their requests."""

    def __init__(self, address: str, pictures: list[bytes], options: dict[str, Any], concurrency: int) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.faults: list[str] = []
        self._pictures, self._options, self._turns = pictures, options, asyncio.Semaphore(concurrency)
        limits = httpx.Limits(max_connections=concurrency)
        self._client = httpx.AsyncClient(base_url=address, timeout=120, limits=limits)

    async def run(self, kinds: list[str]) -> float:
        """Send one request of each kind; pictures a minute."""
        begin = time.perf_counter()
        await asyncio.gather(*(self._one(index, kind) for index, kind in enumerate(kinds)))
        return 60 * self.outcomes["painted"] / (time.perf_counter() - begin)

    async def _one(self, index: int, kind: str) -> None:
        async with self._turns:
            try:
                await getattr(self, f"_{kind}")(
                    {**self._options, "seed": index}, self._pictures[index % len(self._pictures)]
                )
            except Exception as error:
                self.faults.append(f"{kind}: {error!r}")

    async def _post(self, options: dict[str, Any], body: bytes, **more: Any) -> httpx.Response:
        while True:
            begin = time.perf_counter()
            answer = await self._client.post("/v1/paintings", params=options, content=body, **more)
            if answer.status_code != 429:
                self.seconds.append(time.perf_counter() - begin)
                return answer
            self.outcomes["429, tried again"] += 1
            await asyncio.sleep(min(1.0, float(answer.headers["retry-after"])))

    async def _good(self, options: dict[str, Any], body: bytes) -> None:
        answer = await self._post(options, body)
        assert answer.status_code == 200, answer.text
        self.outcomes["painted"] += 1

    async def _bad(self, options: dict[str, Any], body: bytes) -> None:
        answer = await self._post(options, random.choice([body[: len(body) // 2], b"no picture", b"\0" * 5000]))
        assert answer.status_code == 422, answer.text
        self.outcomes["422, no picture"] += 1

    async def _leave(self, options: dict[str, Any], body: bytes) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            await self._client.post("/v1/paintings", params=options, content=body, timeout=random.uniform(0.02, 0.5))
        self.outcomes["left"] += 1

    async def _job(self, options: dict[str, Any], body: bytes) -> None:
        answer = await self._post(options, body, headers={"Prefer": "respond-async"})
        path = answer.headers["location"]
        events = (await self._client.get(path, headers={"Accept": "text/event-stream"})).text
        assert "event: done" in events, events[-300:]
        assert (await self._client.get(path, headers={"Accept": "image/png"})).status_code == 200
        self.outcomes["painted"] += 1


async def bad_day(load: Load, server: int, requests: int) -> tuple[float, list[float]]:
    """Pictures a minute, and the memory of server and worker over time, while the worker is killed twice."""
    random.seed(0)
    kinds = random.choices(["good", "bad", "leave", "job"], [86, 5, 4, 5], k=requests)
    running = asyncio.create_task(load.run(kinds))
    kept: list[float] = []
    kills = [requests // 3, 2 * requests // 3]
    while not running.done():
        await asyncio.sleep(0.25)
        worker = worker_of(server)
        if kills and sum(load.outcomes.values()) - load.outcomes["429, tried again"] >= kills[0] and worker:
            os.kill(worker, signal.SIGKILL)
            kills.pop(0)
        kept.append(memory(server, worker))
    assert not kills
    return await running, kept


@click.command()
@click.argument("picture", type=click.Path(exists=True, path_type=Path))
@click.option("--requests", default=1000, show_default=True)
@click.option("--concurrency", default=32, show_default=True)
@click.option("--size", default=64, show_default=True)
@click.option("--steps", default=2, show_default=True)
@click.option("--steady", default=200, show_default=True, help="Requests of the comparison with the loop.")
def main(picture: Path, requests: int, concurrency: int, size: int, steps: int, steady: int) -> None:
    """Measure, and fail if a request was lost."""
    pictures, options = files(picture), {"size": size, "steps": steps}
    loops = [loop_rate(pictures, steady, options)]
    with serving() as (_, address):
        quiet = Load(address, pictures, options, concurrency)
        rate = asyncio.run(quiet.run(["good"] * steady))
    loops.append(loop_rate(pictures, steady, options))
    with serving("--queue", "16") as (server, address):
        load = Load(address, pictures, options, concurrency)
        stormy, kept = asyncio.run(bad_day(load, server, requests))
        ended = httpx.get(address + "/metrics").text
        restarts = (re.search(r"lsast_worker_restarts (\d+)", ended) or ["", "?"])[1]
    third = len(kept) // 3
    quantiles = statistics.quantiles(load.seconds, n=20)
    few, many, peak = max(kept[:third]), max(kept[-third:]), max(kept)
    answers = ", ".join(f"{count} {name}" for name, count in sorted(load.outcomes.items()))
    share = 100 * rate / statistics.mean(loops)
    rows = {
        f"one `Stylizer` in a loop, n = {steady}, before, after": f"{loops[0]:.0f}, {loops[1]:.0f} pictures a minute",
        f"server, {steady} requests": f"{rate:.0f} pictures a minute, {share:.0f} % of the loop",
        f"bad day, {requests} requests, {concurrency} at once": f"{stormy:.0f} pictures a minute",
        "answers": answers,
        "workers started anew": restarts,
        "latency p50, p95": f"{statistics.median(load.seconds):.2f} s, {quantiles[-1]:.2f} s",
        "memory of server and worker: first third, last third, peak": f"{few:.0f}, {many:.0f}, {peak:.0f} MB",
    }
    print(describe())
    print("| | |\n|---|---|")
    for name, value in {**rows, "lost": len(load.faults) + len(quiet.faults)}.items():
        print(f"| {name} | {value} |")
    for fault in (quiet.faults + load.faults)[:5]:
        click.echo(fault, err=True)
    raise SystemExit(1 if load.faults or quiet.faults else 0)


if __name__ == "__main__":
    main()
