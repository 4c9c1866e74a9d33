"""Watched folders: every picture that is added or changes is painted."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lsast_engines.errors import MissingExtraError, PictureError, UsageError

from .inputs import STDIO, Job, named, plan_jobs

SETTLED = 0.5
"""Seconds for which a file must not have changed before it is painted: it may still be copied."""

_log = logging.getLogger("lsast.cli")


def check_watch(sources: Sequence[str], out: str) -> None:
    """Check that the arguments can be watched; a `UsageError` for an IN that is not a folder, or an OUT that cannot be
    one, a `MissingExtraError` without watchfiles."""
    wrong = [source for source in sources if source == STDIO or not Path(source).is_dir()]
    if wrong:
        raise UsageError(f"found {', '.join(wrong)} to watch; expected folders")
    if out == STDIO or (Path(out).exists() and not Path(out).is_dir()):
        raise UsageError(f"found {out} as OUT of watched folders; expected a folder")
    _watchfiles()


def watch(
    sources: Sequence[str], out: str, *, overwrite: bool = False, stop: threading.Event | None = None
) -> Iterator[Job]:
    """Yield a job for every picture whose painting is missing or older, now and after every change; never ends.

    A job counts as done when the next one is asked for, even if it failed: it comes again only after its source has
    changed. With `overwrite`, every picture that has a newer painting is yielded once, too. `stop` ends the watching.
    """
    with _each_once("lsast.images"), _each_once("lsast.cli"):
        yield from _new_jobs(sources, out, overwrite, stop)


@contextlib.contextmanager
def _each_once(name: str) -> Iterator[None]:
    """Log what is the same only once while the block runs: a folder is searched again and again."""
    logger, said = logging.getLogger(name), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in said
        said.add(record.getMessage())
        return not known

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def _new_jobs(sources: Sequence[str], out: str, overwrite: bool, stop: threading.Event | None) -> Iterator[Job]:
    seen: dict[Path | None, tuple[int, int]] = {}
    again = True
    for changed in _changes(sources, stop):
        if not changed and not again:
            continue
        again = False
        for job in _jobs(sources, out):
            try:
                state = os.stat(str(job.source))
                painted = os.stat(str(job.out)).st_mtime_ns if os.path.exists(str(job.out)) else 0
            except OSError:  # removed since it was found
                continue
            if seen.get(job.source) == (state.st_mtime_ns, state.st_size):
                continue
            again = True  # it has not settled, or is painted now, during which others may be added
            if abs(time.time() - state.st_mtime) < SETTLED:
                continue
            is_new = job.source not in seen and not overwrite
            seen[job.source] = (state.st_mtime_ns, state.st_size)
            if not (is_new and painted >= state.st_mtime_ns):
                yield job


def _changes(sources: Sequence[str], stop: threading.Event | None) -> Iterator[bool]:
    """Whether something has changed, after every change and at least every `SETTLED` seconds: a file that has not
    settled yet gives no further signal."""
    timeout = int(1000 * SETTLED)
    try:
        for changes in _watchfiles().watch(
            *sources, stop_event=stop, step=50, debounce=200, rust_timeout=timeout, yield_on_timeout=True
        ):
            yield bool(changes)
    # A name that is not UTF-8, a folder that is closed to us, more folders than the system watches …
    except (RuntimeError, OSError, ValueError) as error:
        _log.info("the folders are searched every %g s instead of watched (%s)", SETTLED, error)
        while not (stop and stop.is_set()):
            yield True
            time.sleep(SETTLED)


def _jobs(sources: Sequence[str], out: str) -> Iterator[Job]:
    """The jobs of every folder by itself, because a folder without pictures is no fault here; the others are logged."""
    for source in sources:
        below = out if len(sources) == 1 else str(Path(out) / Path(source).resolve().name)
        try:
            plan = plan_jobs([source], below + "/")
        except PictureError:  # no picture yet
            continue
        except UsageError as error:  # all that there is has the same output
            _log.warning("%s", error)
        else:
            for failure in plan.failures.items():
                _log.warning("cannot paint: %s", named(*failure))
            yield from plan.jobs


def _watchfiles() -> Any:
    try:
        import watchfiles
    except ImportError:  # also of one that is installed and does not load
        raise MissingExtraError("watchfiles", "watch") from None
    return watchfiles
