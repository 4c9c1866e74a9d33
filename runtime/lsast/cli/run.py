"""Painting jobs one after another on one `Stylizer`, with progress bars, reports and a summary.

A file that fails does not stop the others. Existing paintings are skipped and files are written whole, so that the same
call continues one that was killed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsast_engines.cli import describe, is_closed, quiet, write_stdout
from lsast_engines.errors import BundleError, PictureError, StyleError, UsageError

from .inputs import Job, named, require_input

if TYPE_CHECKING:
    from ..options.options import Options
    from ..result import Result
    from ..stylizer import Stylizer

Report = dict[str, Any]
_SAME_FOR_ALL = (UsageError, StyleError, BundleError)
"""Errors that every other picture would meet as well: they end the run."""

_log = logging.getLogger("lsast.cli")


@dataclass
class RunSummary:
    """What became of the files of a run."""

    painted: int = 0
    skipped: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """The reason of each failure, by file name."""

    def text(self) -> str:
        """One line of counts, then one line for each failure."""
        counts = f"painted {self.painted}, failed {len(self.failures)}"
        if self.skipped:
            counts += f", skipped {self.skipped} that exist (--overwrite paints them again)"
        return "\n".join([counts, *(f"  - {named(*failure)}" for failure in self.failures.items())])


class ProgressBars:
    """Progress bars on stderr if that is a terminal: files, steps of the current one, frames of a video."""

    def __init__(self, files: int | None) -> None:
        """Show the bars of `files` files; None is an unknown number, 1 shows no bar for files."""
        from tqdm import tqdm

        several, off = files != 1, quiet() or None  # None is off where stderr is no terminal
        self._files = tqdm(total=files, desc="files", unit="file", position=0, disable=off if several else True)
        self._steps = tqdm(desc="opening", unit="step", position=int(several), leave=False, disable=off)
        self._frames: Any = None
        self._new_frames = functools.partial(
            tqdm, desc="frames", unit="frame", position=int(several) + 1, leave=False, disable=off
        )

    def on_step(self, step: int, total: int, preview: object) -> None:
        """See `Stylizer.stylize`."""
        if step == 0:
            self._steps.reset(total)
            self._steps.set_description("painting")
        self._steps.update(step - self._steps.n)

    def on_frame(self, done: int, total: int | None) -> None:
        """See `transcode.paint_video`."""
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
        """Take the bars off the terminal while the block writes to it."""
        with self._files.external_write_mode():
            yield

    def close(self) -> None:
        """Remove the bars of the current file and leave the bar of the files."""
        if self._frames is not None:
            self._frames.close()
        self._steps.close()
        self._files.close()


def open_stylizer(where: dict[str, Any], options: dict[str, Any]) -> Stylizer:
    """Check the options of all paintings, which takes no engine, then open the engines.

    Args:
        where: arguments of `lsast.load`.
        options: keywords of `Stylizer.stylize`.

    Raises:
        LsastError: see `lsast.load` and `Stylizer.resolve`.
    """
    from lsast_engines.bundle.bundle import Bundle, find_bundle

    from ..request import make_schedule, require_graphs, resolve_options
    from ..stylizer import load

    bundle = Bundle.open(find_bundle(where["bundle"]), verify_hashes=False)
    resolved = resolve_options(bundle, without_mask(options), None, bundle.open_style)[0]
    require_graphs(bundle, resolved)
    make_schedule(bundle, resolved)
    return load(**where, preset=options.get("preset"))


def warn_of_faults(
    jobs: Iterable[Job],
    failures: dict[str, str],
    stylizer: Callable[[], Stylizer],
    options: dict[str, Any],
    *,
    overwrite: bool,
) -> None:
    """Say of each job, before the first picture is read, what can be told of its failure; arguments as of `paint_all`.

    Raises:
        UsageError, StyleError, BundleError: the options are invalid for all.
    """
    for failure in failures.items():
        _log.warning("cannot paint: %s", named(*failure))
    for job in jobs:
        if overwrite or not os.path.exists(str(job.out)):
            try:
                check(job, stylizer().resolve(**without_mask(options)))
            except Exception as error:
                if isinstance(error, _SAME_FOR_ALL) and not job.is_video:
                    raise
                _log.warning("cannot paint: %s", named(str(job.source), describe(error)))


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
        jobs: the jobs, which may be endless.
        stylizer: gives the open stylizer; called before the first file that is painted.
        options: keywords of `Stylizer.stylize`.
        overwrite: paint those again whose painting exists.
        bars: show the progress.
        report: called for each file with its `status` (painted, skipped, failed), `source` and `out`, and with the
            facts of `to_report` or the `error`.
        summary: counts what became of each file.

    Raises:
        UsageError, StyleError, BundleError: every other picture would fail with it, too.
    """
    for job in jobs:
        names = {"source": str(job.source), "out": str(job.out)}  # of several jobs, none is a stream
        if job.out is not None and os.path.exists(job.out) and not overwrite:
            summary.skipped += 1
            report({"status": "skipped", **names})
            bars.file_done()
            continue
        painter = stylizer()
        try:
            check(job, painter.resolve(**without_mask(options)))
            facts = paint(job, painter, options, bars)
        except Exception as error:  # whatever it is, the other files are still painted
            if isinstance(error, _SAME_FOR_ALL) and not job.is_video:
                raise
            _log.debug("%s", job.source, exc_info=True)
            reason = " ".join(describe(error).split())
            summary.failures[names["source"]] = reason
            report({"status": "failed", **names, "error": reason})
        else:
            summary.painted += 1
            summary.failures.pop(names["source"], None)  # a watched file that was mended
            report({"status": "painted", **names, **facts})
        bars.file_done()


def without_mask(options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `Stylizer.stylize` that are options: all but the mask."""
    return {name: value for name, value in options.items() if name != "mask"}


def check(job: Job, options: Options | None = None) -> None:
    """Check that a job's source is there and that its output can be written, as far as can be told before painting.

    Args:
        job: the job.
        options: what it is painted with; None before they are known, then the size of the painting is not checked.

    Raises:
        UsageError: a suffix that is not written, or a folder.
        PictureError: no source, no folder that can be written, or a picture too large for the output's format.
        LsastError: for a video, see `transcode.check_video`.
    """
    if job.source is not None:
        require_input(job.source)
    if job.source is not None and job.out is not None and job.is_video:
        from ..video.transcode import check_video

        check_video(job.source, job.out)
    elif job.out is not None:
        from ..result import validate_output_path

        keeps_size = options is not None and options.fit != "stretch"
        validate_output_path(job.out, stored_size(job.source) if keeps_size and job.source else None)
    elif is_closed(sys.stdout):
        raise PictureError("found standard output closed; expected an open one, or the name of a file as OUT")


def stored_size(source: Path) -> tuple[int, int] | None:
    """Width and height of a picture, which is not decoded; None if they cannot be told."""
    from lsast_engines.picture_file import open_image

    # What is wrong with a picture is told when it is read. A pipe can be read only once.
    with contextlib.suppress(Exception):
        if source.is_file():
            with source.open("rb") as handle:
                return open_image(handle, str(source)).size
    return None


def paint(job: Job, stylizer: Stylizer, options: dict[str, Any], bars: ProgressBars) -> Report:
    """Paint one picture or video and write it; returns the facts for a report."""
    begin = time.perf_counter()
    if job.source is not None and job.out is not None and job.is_video:
        from ..video.transcode import paint_video

        facts = paint_video(job.source, job.out, stylizer, options, bars.on_step, bars.on_frame)
        last = facts.pop("result")
        painted = {} if last is None else to_report(last, stylizer, {})
        return {**painted, **facts, "seconds": {"video": time.perf_counter() - begin}}
    source = job.source or sys.stdin.buffer.read()
    if not source:
        raise PictureError("found nothing on standard input; expected a picture")
    result = stylizer.stylize(source, **options, on_step=bars.on_step)
    begin = time.perf_counter()
    if job.out is not None:
        result.save(job.out)
    else:
        buffer = io.BytesIO()
        result.write(buffer)
        write_stdout(buffer.getvalue())
    return to_report(result, stylizer, {"save": time.perf_counter() - begin})


def to_report(result: Result, stylizer: Stylizer, seconds: dict[str, float]) -> Report:
    """How a painting was made, ready for JSON; `seconds` are added to its own."""
    return {
        "bundle": stylizer.bundle.manifest.name,
        "style": result.options.style,
        **{name: getattr(stylizer.choice, name) for name in ("backend", "device", "compute_dtype", "reason")},
        "seconds": {**result.seconds, **seconds},
        "options": asdict(result.options),
    }
