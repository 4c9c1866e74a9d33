"""The arguments IN and OUT of `lsast-run`: files, folders, patterns and `-`, resolved before anything is painted.

No picture is opened here, so that all faults of the arguments are reported at once, and before the first painting.
"""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from lsast_engines.errors import UsageError, fault_list

from ..images.formats import VIDEOS, WRITTEN_PICTURES, WRITTEN_VIDEOS

STDIO = "-"
"""The name of standard input as IN, and of standard output as OUT."""


@dataclass(frozen=True)
class Job:
    """One source and where its painting goes."""

    source: Path | None
    """A picture or a video; None is standard input."""
    out: Path | None
    """The file to write; None is standard output."""

    @property
    def is_video(self) -> bool:
        """Whether the source is a video, by its suffix."""
        return self.source is not None and self.source.suffix.lower() in VIDEOS


@dataclass(frozen=True)
class Plan:
    """All jobs of one call."""

    jobs: tuple[Job, ...]
    """In the order in which they are painted."""
    single: bool
    """Whether the call names one picture and one file for it. Then an existing file is replaced, and a failure ends the
    call; otherwise existing paintings are skipped, and failures are listed at the end."""


def plan_jobs(sources: Sequence[str], out: str) -> Plan:
    """Find the pictures and videos that the arguments of a call name, and name their outputs.

    - A file is painted to the file OUT, or into OUT if that is a folder.
    - Of several sources OUT is a folder. Names stay; `.png` or `.mp4` is added to formats that are not written.
    - A folder is searched at any depth for pictures (no hidden ones, no videos, nothing in OUT). Its structure is kept:
      of a single folder directly below OUT, of several below OUT and the folder's name.
    - A pattern of `*`, `?`, `[…]`, `**` finds files, unless a file has that name. Their structure is kept from the
      first folder with such a character.
    - `-` is standard input or output, and stands alone.

    Args:
        sources: the IN arguments, at least one.
        out: the OUT argument.

    Raises:
        UsageError: a pattern without files, an OUT that cannot hold the paintings, two sources with one output.
        PictureError: a folder without pictures.
    """
    if STDIO in (*sources, out):
        return _stdio_plan(sources, out)
    target = Path(out)
    is_folder = target.is_dir() or out.endswith(("/", os.sep))
    if len(sources) == 1 and _is_file_name(sources[0]) and not is_folder:
        return Plan((Job(Path(sources[0]), target),), single=True)
    if target.exists() and not target.is_dir():
        raise UsageError(f"found the file {target} as OUT of several pictures; expected a folder")
    if target.suffix.lower() in WRITTEN_PICTURES | WRITTEN_VIDEOS and not is_folder:
        raise UsageError(f"found {target} as OUT of several pictures; expected a folder (end it with / to make one)")
    jobs = {
        Job(source, target / _output_name(name))
        for given in sources
        for source, name in _find(given, target, below_own_name=len(sources) > 1)
    }
    sources_of = defaultdict(list)
    for job in jobs:
        sources_of[job.out].append(str(job.source))
    faults = [f"{path}: {', '.join(sorted(names))}" for path, names in sources_of.items() if len(names) > 1]
    if faults:
        raise UsageError(fault_list("several sources have the same output; paint them in two calls:", faults))
    return Plan(tuple(sorted(jobs, key=lambda job: str(job.source))), single=False)


def _stdio_plan(sources: Sequence[str], out: str) -> Plan:
    if len(sources) > 1 or (sources[0] != STDIO and not _is_file_name(sources[0])):
        raise UsageError(f"found {' '.join(sources)} {out}; expected one picture where - is IN or OUT")
    if out != STDIO and (out.endswith(("/", os.sep)) or Path(out).is_dir()):
        raise UsageError(f"found the folder {out} as OUT of standard input; expected the name of a file")
    job = Job(*(None if name == STDIO else Path(name) for name in (sources[0], out)))
    if job.is_video and job.out is None:
        raise UsageError(f"found the video {job.source} and OUT -; expected the name of a file: videos need one")
    return Plan((job,), single=True)


def _is_file_name(given: str) -> bool:
    path = Path(given)
    return not path.is_dir() and (path.exists() or not glob.has_magic(given))


def _find(given: str, target: Path, *, below_own_name: bool) -> Iterator[tuple[Path, Path]]:
    """Every file that an IN argument names, and its name below OUT."""
    root = path = Path(given)
    below = Path()
    if path.is_dir():
        from lsast_engines.images import find_pictures

        files = find_pictures(path)
        below = Path(path.resolve().name) if below_own_name else below
    elif _is_file_name(given):
        yield path, Path(path.name)
        return
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
        files = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if Path(name).is_file()]
        if not files:
            raise UsageError(f"found no file for the pattern {given}; expected at least one")
    # Files in OUT are earlier paintings if OUT lies inside the searched folder.
    out = target.resolve()
    for file in files:
        if out == root.resolve() or out not in file.resolve().parents:
            yield file, below / file.relative_to(root)


def _output_name(name: Path) -> Path:
    """The name of an output: the source's, with a suffix added if its format is not written."""
    suffix = name.suffix.lower()
    if suffix in WRITTEN_PICTURES | WRITTEN_VIDEOS:
        return name
    return name.with_name(name.name + (".mp4" if suffix in VIDEOS else ".png"))
