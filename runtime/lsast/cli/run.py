"""Painting jobs one after another on one `Stylizer`, with progress bars, reports and a summary.

A file that fails does not stop the others. Existing paintings are skipped and files are written whole, so that the same
call continues one that was killed.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import click
from tqdm import tqdm

from lsast_engines.cli import USAGE, as_json, describe, echo, fail, is_closed, print_result, quiet, write_stdout
from lsast_engines.errors import BundleError, PictureError, StyleError, UsageError
from lsast_engines.picture_file import read_stream

from ..images.contact_sheet import contact_sheet, parse_axes
from ..images.formats import read_header
from ..options.options import Options
from ..result import Result, validate_output_path
from ..stylizer import Stylizer, load
from ..video.transcode import check_video, paint_video
from .inputs import Job, named, require_input
from .watch import check_watch, watch

Report = dict[str, Any]
_SAME_FOR_ALL = (UsageError, StyleError, BundleError)
"""Errors that every other picture would meet as well: they end the run."""

_log = logging.getLogger("lsast.cli")


class ProgressBars:
    """Progress bars on stderr if that is a terminal: files, steps of the current one, frames of a video."""

    def __init__(self, files: int | None) -> None:
        """Show the bars of `files` files; None is an unknown number, 1 shows no bar for files."""
        several, off = files != 1, quiet() or None  # None is off where stderr is no terminal
        self._files = tqdm(total=files, desc="files", unit="file", position=0, disable=off if several else True)
        self._steps = tqdm(desc="opening", unit="step", position=int(several), leave=False, disable=off)
        self._frames: Any = None
        self._new_frames = partial(tqdm, desc="frames", unit="frame", position=several + 1, leave=False, disable=off)
        self.paused = self._files.external_write_mode
        """Takes the bars off the terminal while a block writes to it."""

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
        self._close_frames()
        self._files.update()

    def close(self) -> None:
        """Remove the bars of the current file and leave the bar of the files."""
        self._close_frames()
        self._steps.close()
        self._files.close()

    def _close_frames(self) -> None:
        if self._frames is not None:
            self._frames.close()
            self._frames = None


def paint_several(
    jobs: Iterable[Job], failures: dict[str, str], where: dict[str, Any], options: dict[str, Any], overwrite: bool
) -> None:
    """Paint one job after another, report each on stdout and summarise on stderr. What can be told of a failure before
    the first picture is read is logged then. Errors that every other picture would meet, too, end the run.

    Args:
        jobs: a tuple, or endless for watched folders, which an interrupt ends.
        failures: what cannot be painted, by the name of its file, and why; those of the jobs are added.
        where: arguments of `lsast.load`, which is called before the first file that is painted.
        options: keywords of `Stylizer.stylize`.
        overwrite: paint those again whose painting exists.
    """
    count = len(jobs) if isinstance(jobs, tuple) else None
    counts: Counter[str] = Counter()

    def summarise() -> None:
        text = f"painted {counts['painted']}, failed {len(failures)}"
        if counts["skipped"]:
            text += f", skipped {counts['skipped']} that exist (--overwrite paints them again)"
        if failures or not quiet():
            echo(text, *(f"  - {named(*failure)}" for failure in failures.items()), err=True)

    with contextlib.ExitStack() as stack:
        stack.callback(summarise)
        bars = stack.enter_context(contextlib.closing(ProgressBars(count)))
        stylizer = cache(lambda: stack.enter_context(load(**where, options=options)))

        def report(status: str, source: str, out: str | None, **facts: Any) -> None:
            counts[status] += 1
            if as_json() or status == "painted":
                with bars.paused():
                    print_result({"status": status, "source": source, "out": out, **facts}, out)

        for source, reason in failures.items():
            report("failed", source, None, error=reason)
            if count is not None:
                _log.warning("cannot paint: %s", named(source, reason))

        def attempt(job: Job, work: Callable[[], Report]) -> Report | str:
            """The report of a painting, or why it failed: whatever that is, the other files are still painted."""
            painter = stylizer()
            try:
                check(job, painter.resolve(**options))
                return work()
            except Exception as error:
                if isinstance(error, _SAME_FOR_ALL) and not job.is_video:
                    raise
                _log.debug("%s", job.source, exc_info=True)
                return describe(error)

        for job in jobs if isinstance(jobs, tuple) else ():
            if (overwrite or not os.path.exists(str(job.out))) and isinstance(found := attempt(job, dict), str):
                _log.warning("cannot paint: %s", named(str(job.source), found))
        with contextlib.suppress(KeyboardInterrupt) if count is None else contextlib.nullcontext():
            for job in jobs:
                source, out = str(job.source), str(job.out)  # of several jobs, none is a stream
                if os.path.exists(out) and not overwrite:
                    report("skipped", source, out)
                elif isinstance(facts := attempt(job, partial(paint, job, stylizer(), options, bars)), str):
                    failures[source] = facts
                    report("failed", source, out, error=facts)
                else:
                    failures.pop(source, None)  # a watched file that was mended
                    report("painted", source, out, **facts)
                bars.file_done()
    if failures:
        raise click.exceptions.Exit(1)


def paint_sheet(job: Job, axes: tuple[str, ...], where: dict[str, Any], options: dict[str, Any]) -> None:
    """Paint a picture with every combination of some options and write them on one contact sheet."""
    assert job.source is not None
    assert job.out is not None
    check(job)
    parsed = parse_axes(axes)
    with (
        load(**where, options=options) as stylizer,
        tqdm(desc="painting", unit="cell", leave=False, disable=quiet() or None) as bar,
    ):

        def on_cell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        sheet = contact_sheet(stylizer, job.source, parsed, on_cell=on_cell, out=job.out, **options)
    Result(sheet.image, {}, sheet.options).save(job.out)
    facts = {"out": str(job.out), "axes": parsed, "cells": len(sheet.cells), "options": asdict(sheet.options)}
    print_result(facts, str(job.out))


def paint_one(job: Job, where: dict[str, Any], options: dict[str, Any]) -> None:
    """Paint and save one picture, with a progress bar on stderr if that is a terminal."""
    if as_json() and job.out is None:
        fail("found --json and OUT -; expected the name of a file: both would go to standard output", USAGE)
    check(job)
    begin = time.perf_counter()
    with contextlib.closing(ProgressBars(1)) as bars, load(**where, options=options) as stylizer:
        opened = time.perf_counter()
        check(job, stylizer.resolve(**options))
        report = {"out": str(job.out), **paint(job, stylizer, options, bars)}
    report["seconds"] = {"open": opened - begin, **report["seconds"]}
    if job.out is not None:
        print_result(report, str(job.out))


def paint_watched(
    sources: tuple[str, ...], out: str, where: dict[str, Any], options: dict[str, Any], overwrite: bool
) -> None:
    """Paint the pictures in folders and those that are added, until the keyboard interrupts."""
    check_watch(sources, out)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # commands that a script starts with & ignore it
    echo(f"watching {', '.join(sources)}; Ctrl-C ends", err=True)
    paint_several(watch(sources, out, overwrite=overwrite), {}, where, options, True)


def check(job: Job, options: Options | None = None) -> None:
    """Check that a job's source is there and that its output can be written, as far as can be told before painting:
    with the `options` that it is painted with, the size of the painting, too. A `UsageError` for a suffix
    that is not written, or a folder; a `PictureError` where there is no source, no folder that can be written, or too
    large a picture for the format; for a video see `transcode.check_video`."""
    if job.source is not None:
        require_input(job.source)
    if job.source is not None and job.out is not None and job.is_video:
        check_video(job.source, job.out)
    elif job.out is not None:
        keeps_size = options is not None and options.fit != "stretch"
        header = read_header(job.source) if keeps_size and job.source else None
        validate_output_path(job.out, header and header[0])
    elif is_closed(sys.stdout):
        raise PictureError("found standard output closed; expected an open one, or the name of a file as OUT")


def paint(job: Job, stylizer: Stylizer, options: dict[str, Any], bars: ProgressBars) -> Report:
    """Paint one picture or video and write it; returns the facts for a report."""
    begin = time.perf_counter()
    if job.source is not None and job.out is not None and job.is_video:
        facts = paint_video(job.source, job.out, stylizer, options, bars.on_step, bars.on_frame)
        last = facts.pop("result")
        painted = {} if last is None else to_report(last, stylizer, {})
        return {**painted, **facts, "seconds": {"video": time.perf_counter() - begin}}
    source = job.source or read_stream(sys.stdin.buffer, "standard input")
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
