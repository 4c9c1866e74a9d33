"""Painting a plan: one job after another on one `Stylizer`, with bars, reports and a summary.

A file that cannot be painted does not keep the others from being painted. What is there is not painted again, and files
appear whole or not at all, so that the same call goes on with one that was killed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsast_engines.errors import BundleError, MissingExtraError, StyleError, UsageError

from .inputs import Job

if TYPE_CHECKING:
    from ..result import Result
    from ..stylizer import Stylizer

Report = dict[str, Any]
_CALL_IS_WRONG = (UsageError, StyleError, BundleError, MissingExtraError)
"""Errors that every other file would meet, too: they end the run."""


@dataclass
class RunSummary:
    """What became of a run's files."""

    painted: int = 0
    skipped: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """Why each file failed that did, by its name."""

    def text(self) -> str:
        """One line of counts, then one for each failure."""
        counts = f"painted {self.painted}, failed {len(self.failures)}"
        if self.skipped:
            counts += f", skipped {self.skipped} that were there (--overwrite paints them again)"
        return "\n".join([counts, *(f"  - {_named(name, reason)}" for name, reason in self.failures.items())])


def _named(name: str, reason: str) -> str:
    """A reason that names its file."""
    return reason if name in reason else f"{name}: {reason}"


class ProgressBars:
    """Progress bars on stderr, where that is a terminal: files, steps of the one being painted, a video's frames."""

    def __init__(self, files: int | None) -> None:
        from tqdm import tqdm

        # A bar that shows 1 of 1 says nothing.
        self._files = tqdm(total=files, desc="files", unit="file", position=0, disable=None if files != 1 else True)
        # None is not known: watched folders.
        row = int(files != 1)
        self._steps = tqdm(desc="opening", unit="step", position=row, leave=False, disable=None)
        self._frames: Any = None
        self._new_frames = functools.partial(
            tqdm, desc="frames", unit="frame", position=row + 1, leave=False, disable=None
        )

    def on_step(self, step: int, total: int, preview: object) -> None:
        """See `Stylizer.stylize`."""
        if step == 0:
            self._steps.reset(total)
            self._steps.set_description("painting")
        self._steps.update(step - self._steps.n)

    def on_frame(self, done: int, total: int | None) -> None:
        """See `video.paint_video`."""
        if self._frames is None:
            self._frames = self._new_frames(total=total, initial=done)
        self._frames.update(done - self._frames.n)

    def file_done(self) -> None:
        """Count one file."""
        if self._frames is not None:
            self._frames.close()
            self._frames = None
        self._files.update()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bars off the terminal while something else is written to it."""
        with self._files.external_write_mode():
            yield

    def close(self) -> None:
        """Remove the bars of the file being painted and leave the files'."""
        if self._frames is not None:
            self._frames.close()
        self._steps.close()
        self._files.close()


def paint_all(
    jobs: Iterable[Job],
    stylizer: Callable[[], Stylizer],
    options: dict[str, Any],
    *,
    overwrite: bool,
    bars: ProgressBars,
    report: Callable[[Report], None],
    summary: RunSummary,
) -> None:
    """Paint one job after another.

    Args:
        jobs: what to paint; may be endless.
        stylizer: gives the open stylizer, asked for before the first file that is to be painted.
        options: keywords of `Stylizer.stylize`.
        overwrite: paint what is there again.
        bars: told of every step and file.
        report: called with each file's `status` (painted, skipped, failed), `source`, `out`, and what `to_report` or
            `error` tells.
        summary: counts what became of each job.

    Raises:
        UsageError, StyleError, BundleError, MissingExtraError: what no other file could pass either.
    """
    for job in jobs:
        names = {"source": str(job.source), "out": str(job.out)}  # of several, none is a stream
        if job.out is not None and job.out.exists() and not overwrite:
            summary.skipped += 1
            report({"status": "skipped", **names})
        else:
            try:
                facts = paint(job, stylizer(), options, bars)
            except _CALL_IS_WRONG:
                raise
            # Whatever one file brings about, the others are still to be painted.
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                summary.failures[names["source"]] = reason
                report({"status": "failed", **names, "error": reason})
            else:
                summary.painted += 1
                summary.failures.pop(names["source"], None)  # a watched file that was mended
                report({"status": "painted", **names, **facts})
        bars.file_done()


def check(job: Job) -> None:
    """Check, before a bundle is opened, that a job's output can be written.

    Raises:
        UsageError: a suffix that is not written, or a folder.
        LsastError: for a video, see `video.check_video`.
    """
    if job.source is not None and job.out is not None and job.is_video:
        from ..video.transcode import check_video

        check_video(job.source, job.out)
    elif job.out is not None:
        from ..result import validate_output_path

        validate_output_path(job.out)


def paint(job: Job, stylizer: Stylizer, options: dict[str, Any], bars: ProgressBars) -> Report:
    """Paint one picture or video and write it; the facts of it for a report."""
    begin = time.perf_counter()
    if job.source is not None and job.out is not None and job.is_video:
        from ..video.transcode import paint_video

        facts = paint_video(job.source, job.out, stylizer, options, bars.on_step, bars.on_frame)
        last = facts.pop("result")
        painted = {} if last is None else to_report(last, stylizer, {})
        return {**painted, **facts, "seconds": {"video": time.perf_counter() - begin}}
    source = sys.stdin.buffer.read() if job.source is None else job.source
    result = stylizer.stylize(source, **options, on_step=bars.on_step)
    begin = time.perf_counter()
    write(result, job.out)
    return to_report(result, stylizer, {"save": time.perf_counter() - begin})


def write(result: Result, out: Path | None) -> None:
    """Write a painting to a file, or as a PNG to standard output."""
    if out is None:
        result.write(sys.stdout.buffer)
    else:
        result.save(out)


def to_report(result: Result, stylizer: Stylizer, seconds: dict[str, float]) -> Report:
    """How a painting came about, ready for JSON; `seconds` are added to its own."""
    return {
        "bundle": stylizer.bundle.manifest.name,
        "style": result.options.style,
        "backend": stylizer.backend,
        "seconds": {**result.seconds, **seconds},
        "options": asdict(result.options),
    }
