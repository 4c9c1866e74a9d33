"""Painting a plan: one job after another on one `Stylizer`, with bars, reports and a summary.

A file that cannot be painted does not keep the others from being painted. What is there is not painted again, and files
appear whole or not at all, so that the same call goes on with one that was killed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsast_engines.errors import BundleError, MissingExtraError, StyleError, UsageError

from .feeding import Job

if TYPE_CHECKING:
    from .result import Result
    from .stylizer import OnStep, Stylizer

Report = dict[str, Any]
_CALL_IS_WRONG = (UsageError, StyleError, BundleError, MissingExtraError)
"""Errors that every other file would meet, too: they end the run."""


@dataclass
class Tally:
    """What became of a run's files."""

    painted: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    """A line for each file that failed: its name and why."""

    def summary(self) -> str:
        """One line of counts, then one for each failure."""
        counts = f"painted {self.painted}, failed {len(self.failures)}"
        if self.skipped:
            counts += f", skipped {self.skipped} that were there (--overwrite paints them again)"
        return "\n".join([counts, *(f"  - {line}" for line in self.failures)])


class Bars:
    """Two progress bars on stderr, where that is a terminal: files, and the steps of the one being painted."""

    def __init__(self, files: int | None) -> None:
        from tqdm import tqdm

        # A bar that shows 1 of 1 says nothing.
        self._files = tqdm(total=files, desc="files", unit="file", position=0, disable=None if files != 1 else True)
        self._steps = tqdm(desc="opening", unit="step", position=int(files != 1), leave=False, disable=None)

    def on_step(self, step: int, total: int, preview: object) -> None:
        """See `Stylizer.stylize`."""
        if step == 0:
            self._steps.reset(total)
            self._steps.set_description("painting")
        self._steps.update(step - self._steps.n)

    def file_done(self) -> None:
        """Count one file."""
        self._files.update()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bars off the terminal while something else is written to it."""
        with self._files.external_write_mode():
            yield

    def close(self) -> None:
        """Remove the steps' bar and leave the files'."""
        self._steps.close()
        self._files.close()


def paint_all(
    jobs: Iterable[Job],
    stylizer: Callable[[], Stylizer],
    options: dict[str, Any],
    *,
    overwrite: bool,
    bars: Bars,
    report: Callable[[Report], None],
    tally: Tally,
) -> None:
    """Paint one job after another.

    Args:
        jobs: what to paint; may be endless.
        stylizer: gives the open stylizer, asked for before the first file that is to be painted.
        options: keywords of `Stylizer.stylize`.
        overwrite: paint what is there again.
        bars: told of every step and file.
        report: called with each file's `status` (painted, skipped, failed), `source`, `out`, and what `describe` or
            `error` tells.
        tally: counts.

    Raises:
        UsageError, StyleError, BundleError, MissingExtraError: what no other file could pass either.
    """
    for job in jobs:
        names = {"source": str(job.source), "out": str(job.out)}  # of several, none is a stream
        if job.out is not None and job.out.exists() and not overwrite:
            tally.skipped += 1
            report({"status": "skipped", **names})
        else:
            try:
                facts = paint(job, stylizer(), options, bars.on_step)
            except _CALL_IS_WRONG:
                raise
            # Whatever one file brings about, the others are still to be painted.
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                tally.failures.append(f"{job.source}: {reason}")
                report({"status": "failed", **names, "error": reason})
            else:
                tally.painted += 1
                report({"status": "painted", **names, **facts})
        bars.file_done()


def paint(job: Job, stylizer: Stylizer, options: dict[str, Any], on_step: OnStep) -> Report:
    """Paint one picture and write it; the facts of it for a report."""
    source = sys.stdin.buffer.read() if job.source is None else job.source
    result = stylizer.stylize(source, **options, on_step=on_step)
    painted = time.perf_counter()
    write(result, job.out)
    return describe(result, stylizer, {"save": time.perf_counter() - painted})


def write(result: Result, out: Path | None) -> None:
    """Write a painting to a file, or as a PNG to standard output."""
    if out is None:
        result.write(sys.stdout.buffer)
    else:
        result.save(out)


def describe(result: Result, stylizer: Stylizer, seconds: dict[str, float]) -> Report:
    """How a painting came about, ready for JSON; `seconds` are added to its own."""
    return {
        "bundle": stylizer.bundle.manifest.name,
        "style": result.options.style,
        "backend": stylizer.backend,
        "seconds": {**result.seconds, **seconds},
        "options": asdict(result.options),
    }
