"""kill -9 at random moments, and the same command again: the files of an undisturbed run, and nothing is left.

    python -m benchmarks.robustness.kill [--trials 200] [--job run --job train …] [--seed 0]

Every job works in a folder of its own, which is its current folder and its LSAST_HOME. A trial copies the folder as it
was before, starts the command, kills its whole process group after a random time, checks that no file with a final name
is half, runs the command again, and compares all files with those of an undisturbed run. What differs between two
undisturbed runs (files that hold times) is compared by its name only, and listed. Training and exporting take a tiny
base of random weights, which is written as any other. Needs av, torch and an exporter.
"""

import collections
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image

QUICK = ["--size", "64", "--steps", "4", "--threads", "1"]
TRAIN = ["--base", "tiny", "--style", "red", "--images", "paint", "--size", "64", "--steps", "12", "--threads", "1"]
MODULES = {"lsast-run": "lsast", "lsast-train": "lsast_train", "lsast-export": "lsast_export"}


def _resumed(folder: Path) -> list[str]:
    """A training goes on from its checkpoint, where the killed run had written one."""
    checkpoints = list((folder / "runs").rglob("*checkpoint*"))
    return ["lsast-train", *TRAIN, *(["--resume"] if checkpoints else [])]


@dataclass(frozen=True)
class Job:
    """A command that is killed."""

    command: list[str]
    share: int
    """Its part of all trials."""
    begin: float = 0.2
    """The first moment, as a part of the undisturbed run: before, Python imports."""
    again: Callable[[Path], list[str]] | None = None
    """The command after the kill, if it is another one."""
    needs: tuple[str, ...] = ()
    """Jobs whose results lie in the folder before."""
    warm: bool = True
    """Whether the graph cache is there before."""


JOBS = {
    "run": Job(["lsast-run", "photos", "painted", *QUICK], 6),
    "cache": Job(["lsast-run", "photos/0.png", "painted.png", *QUICK], 4, warm=False),
    "openvino cache": Job(["lsast-run", "photos/0.png", "painted.png", "--backend", "openvino", *QUICK], 2, warm=False),
    "video": Job(["lsast-run", "clip.mp4", "painted.mp4", *QUICK], 4),
    "train": Job(["lsast-train", *TRAIN], 2, 0.5, _resumed),
    "bundle": Job(["lsast-export", "bundle", "--base", "tiny", "--out", "bundle"], 1, 0.3),
    "export": Job(["lsast-export", "--base", "bundle", "--style", "red"], 1, 0.5, needs=("train", "bundle")),
}


def _inputs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("photos", 3), ("paint", 6)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((128, 96)).save(folder / name / f"{index}.png")
    import av
    import torch

    from benchmarks.mini.training.mini_base import MiniConfig, build_mini
    from lsast_train.base.lazy_base import save_base

    torch.manual_seed(0)
    save_base(build_mini(MiniConfig.tiny()), folder / "tiny")

    with av.open(str(folder / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(8):
            picture = np.roll(np.asarray(Image.open(folder / "photos/0.png").resize((64, 48))), 4 * index, 1)
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        clip.mux(stream.encode())


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    module, *arguments = command
    return subprocess.Popen(
        [sys.executable, "-m", MODULES[module], *arguments],
        cwd=folder,
        env={**os.environ, "LSAST_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _run(command: list[str], folder: Path) -> str:
    """Run to the end; what is wrong, or nothing."""
    process = _start(command, folder)
    _, errors = process.communicate(timeout=900)
    return "" if process.returncode == 0 else f"exit {process.returncode}: {errors.decode(errors='replace')[-400:]}"


def _files(folder: Path) -> dict[str, str]:
    """What is in the folder: SHA-256 by name. Compiled graphs count by name: the backends' own files vary."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and "home/compiled" not in str(path)
        else ""
        for path in sorted(folder.rglob("*"))
    }


class Killed:
    """The trials of one job."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name, self.job = name, JOBS[name]
        # Every run is in a folder of the same name: the cache names its entries by the bundle's path and the rest.
        self.before, self.work = scratch / f"{name}.before", scratch / "work"
        _inputs(self.before)
        for command in [JOBS[need].command for need in self.job.needs] + (
            [["lsast-run", "photos/0.png", "warm.png", *QUICK]] if self.job.warm else []
        ):
            if fault := _run(command, self.before):
                raise click.ClickException(f"{command}: {fault}")
        (self.before / "warm.png").unlink(missing_ok=True)
        expected = []
        for _ in range(2):
            self._restore()
            begin = time.perf_counter()
            if fault := _run(self.job.command, self.work):
                raise click.ClickException(f"{name}: {fault}")
            self.seconds = time.perf_counter() - begin
            expected.append(_files(self.work))
        self.expected = expected[0]
        self.timed = {file for file in expected[0] if expected[0][file] != expected[1].get(file)}

    def _restore(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.before, self.work, symlinks=True)

    def _faults(self, *, finished: bool) -> list[str]:
        found = _files(self.work)
        faults = [
            f"{file}: other bytes"
            for file in found.keys() & self.expected.keys() - self.timed
            if found[file] != self.expected[file]
        ]
        if finished:
            faults += [f"{file}: left" for file in found.keys() - self.expected.keys()]
            faults += [f"{file}: missing" for file in self.expected.keys() - found.keys()]
        return sorted(faults)

    def trial(self, rng: random.Random) -> tuple[str, list[str]]:
        """Kill once and run again: "killed" or "finished before", and the faults."""
        self._restore()
        process = _start(self.job.command, self.work)
        delay = self.seconds * rng.uniform(self.job.begin, 1)
        try:
            process.wait(delay)
            outcome = "finished before"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            outcome = "killed"
        process.communicate()
        faults = [f"after the kill: {fault}" for fault in self._faults(finished=False)]
        again = self.job.again(self.work) if self.job.again and outcome == "killed" else self.job.command
        # Also where the kill met a process that had written everything and was ending.
        if self.job.again and not self._faults(finished=True):
            return outcome, faults
        if fault := _run(again, self.work):
            faults.append(f"again: {fault}")
        return outcome, faults + self._faults(finished=True)


@click.command()
@click.option("--trials", default=200, show_default=True)
@click.option("--job", "jobs", multiple=True, type=click.Choice(list(JOBS)), help="Of these only.")
@click.option("--seed", default=0, show_default=True)
def main(trials: int, jobs: tuple[str, ...], seed: int) -> None:
    """Kill commands at random moments and check what is left."""
    rng, chosen, bad = random.Random(seed), jobs or tuple(JOBS), 0
    shares = sum(JOBS[name].share for name in chosen)
    print("| job | trials | killed | faults |\n|---|---|---|---|")
    for name in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            killed = Killed(name, Path(scratch))
            count, outcomes, wrong = max(1, round(trials * killed.job.share / shares)), collections.Counter[str](), []
            for number in range(count):
                outcome, faults = killed.trial(rng)
                outcomes[outcome] += 1
                wrong += [faults] if faults else []
                print(f"{name} {number + 1}: {outcome}", *faults, sep="\n  ", file=sys.stderr, flush=True)
        print(f"| {name} | {count} | {outcomes['killed']} | {len(wrong)} |", flush=True)
        if killed.timed:
            print(f"{name}: compared by name only: {', '.join(sorted(killed.timed))}", file=sys.stderr, flush=True)
        bad += len(wrong)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
