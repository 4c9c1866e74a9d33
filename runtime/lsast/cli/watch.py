"""Watched folders: every picture that is added or changes is painted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lsast_engines.errors import MissingExtraError, PictureError, UsageError

from .inputs import STDIO, Job, plan_jobs

SETTLED = 0.5
"""Seconds for which a file must not have changed before it is painted: it may still be copied."""


class Stop(Protocol):
    """Ends the watching, such as a `threading.Event`."""

    def is_set(self) -> bool:
        """Whether to end."""


def check_watch(sources: Sequence[str], out: str) -> None:
    """Check that the arguments can be watched.

    Raises:
        UsageError: an IN that is not a folder, or an OUT that cannot be one.
        MissingExtraError: watchfiles is not installed.
    """
    wrong = [source for source in sources if source == STDIO or not Path(source).is_dir()]
    if wrong:
        raise UsageError(f"found {', '.join(wrong)} to watch; expected folders")
    if out == STDIO or (Path(out).exists() and not Path(out).is_dir()):
        raise UsageError(f"found {out} as OUT of watched folders; expected a folder")
    _watchfiles()


def watch(sources: Sequence[str], out: str, *, overwrite: bool = False, stop: Stop | None = None) -> Iterator[Job]:
    """Yield a job for every picture whose painting is missing or older, now and after every change; never ends.

    A job counts as done when the next one is asked for, even if it failed: it comes again only after its source has
    changed. `plan_jobs` finds the pictures and names the outputs.

    Args:
        sources: the folders.
        out: the folder of the paintings.
        overwrite: also yield, once, every picture that has a newer painting.
        stop: ends the watching; asked twice a second.
    """
    seen: dict[Path | None, tuple[int, int]] = {}
    # A file that has not settled yet gives no further signal, so that waiting ends after some time as well.
    signals = _watchfiles().watch(
        *sources, stop_event=stop, step=50, debounce=200, rust_timeout=int(1000 * SETTLED), yield_on_timeout=True
    )
    again = True
    for changes in signals:
        if not changes and not again:
            continue
        again = False
        for job in _jobs(sources, out):
            try:
                state = job.source.stat() if job.source else None
            except FileNotFoundError:  # removed since it was found
                continue
            if state is None or seen.get(job.source) == (state.st_mtime_ns, state.st_size):
                continue
            again = True  # it has not settled, or is painted now, during which others may be added
            if abs(time.time() - state.st_mtime) < SETTLED:
                continue
            is_new = job.source not in seen and not overwrite
            seen[job.source] = (state.st_mtime_ns, state.st_size)
            done = job.out is not None and job.out.exists() and job.out.stat().st_mtime_ns >= state.st_mtime_ns
            if not (is_new and done):
                yield job


def _jobs(sources: Sequence[str], out: str) -> Iterator[Job]:
    """The jobs of every folder by itself, because a folder without pictures is no fault here."""
    for source in sources:
        below = out if len(sources) == 1 else str(Path(out) / Path(source).resolve().name)
        try:
            yield from plan_jobs([source], below + "/").jobs
        except PictureError:  # no picture yet
            continue


def _watchfiles() -> Any:
    try:
        import watchfiles
    except ImportError:
        raise MissingExtraError("watchfiles", "watch") from None
    return watchfiles
