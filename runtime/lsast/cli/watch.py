"""Folders that are watched: every picture that arrives or changes is painted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lsast_engines.errors import MissingExtraError, PictureError, UsageError

from .inputs import STDIO, Job, plan_jobs

SETTLED = 0.5
"""Seconds for which a file must not have been written to: it may still be on its way."""


class Stop(Protocol):
    """What ends the watching, such as a `threading.Event`."""

    def is_set(self) -> bool:
        """Whether to end."""


def check_watch(sources: Sequence[str], out: str) -> None:
    """Check what is to be watched.

    Raises:
        UsageError: a source that is no folder, or an OUT that cannot be one.
        MissingExtraError: watchfiles is not installed.
    """
    wrong = [source for source in sources if source == STDIO or not Path(source).is_dir()]
    if wrong:
        raise UsageError(f"found {', '.join(wrong)} to watch; expected folders")
    if out == STDIO or (Path(out).exists() and not Path(out).is_dir()):
        raise UsageError(f"found {out} as OUT of watched folders; expected a folder")
    _watchfiles()


def watch(sources: Sequence[str], out: str, *, overwrite: bool = False, stop: Stop | None = None) -> Iterator[Job]:
    """Name every picture whose painting is missing or older than it, now and whenever something changes; never ends.

    A job counts as done once the next one is asked for: whatever became of it, it is named again only after its source
    has changed. `feeding.plan_jobs` says what is found and how outputs are called.

    Args:
        sources: folders.
        out: the folder for paintings.
        overwrite: name also, once, what has a painting that is newer.
        stop: ends the watching; asked about twice a second.
    """
    tried: dict[Path | None, tuple[int, int]] = {}
    # Waiting is by time as well: a file that has not settled yet gives no further sign.
    signs = _watchfiles().watch(
        *sources, stop_event=stop, step=50, debounce=200, rust_timeout=int(1000 * SETTLED), yield_on_timeout=True
    )
    pending = True
    for changes in signs:
        if not changes and not pending:
            continue
        pending = False
        for job in _jobs(sources, out):
            try:
                facts = job.source.stat() if job.source else None
            except FileNotFoundError:  # gone since it was found
                continue
            if facts is None or tried.get(job.source) == (facts.st_mtime_ns, facts.st_size):
                continue
            if abs(time.time() - facts.st_mtime) < SETTLED:
                pending = True
                continue
            again = job.source in tried or overwrite
            tried[job.source] = (facts.st_mtime_ns, facts.st_size)
            if again or not _newer(job.out, facts.st_mtime_ns):
                pending = True  # painting takes its time, and this round knows nothing of what came meanwhile
                yield job


def _jobs(sources: Sequence[str], out: str) -> tuple[Job, ...]:
    jobs: list[Job] = []
    for source in sources:
        try:
            # One by one, for a folder without pictures is no error here; named as all of them together would be.
            below = out if len(sources) == 1 else str(Path(out) / Path(source).resolve().name)
            jobs += plan_jobs([source], below + "/").jobs
        except PictureError:  # no picture yet
            continue
    return tuple(jobs)


def _newer(painting: Path | None, changed: int) -> bool:
    return painting is not None and painting.exists() and painting.stat().st_mtime_ns >= changed


def _watchfiles() -> Any:
    try:
        import watchfiles
    except ImportError:
        raise MissingExtraError("watchfiles", "watch") from None
    return watchfiles
