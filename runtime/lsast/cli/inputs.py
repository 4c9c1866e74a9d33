"""What is painted onto what: files, folders, globs and `-`, laid out before anything is painted.

No picture is opened here, so that every fault of the layout is told at once and before the first minute of painting.
"""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """Everything that one call paints."""

    jobs: tuple[Job, ...]
    """In the order in which they are painted."""
    single: bool
    """Whether the call names one picture and one file for it: it is then painted over whatever is there, and its
    failure is the failure of the call. Otherwise what is there is skipped and what fails is summed up."""


def plan_jobs(sources: Sequence[str], out: str) -> Plan:
    """Find what the arguments of a call name, and name every output.

    - A file goes to the file OUT, or into OUT if that is a folder.
    - Of several, OUT is a folder; names stay, with `.png` or `.mp4` added to kinds that are not written.
    - A folder is searched at any depth for pictures (no hidden ones, no videos, nothing in OUT), and mirrored: a single
      folder into OUT, of several sources each under its own name.
    - A pattern of `*`, `?`, `[…]`, `**` that names no file finds files, mirrored from its first folder without one.
    - `-` is standard input or output, and stands alone.

    Args:
        sources: the IN arguments, at least one.
        out: the OUT argument.

    Raises:
        UsageError: a pattern that finds nothing, an OUT that cannot hold what is found, two sources with one output.
        PictureError: a folder without pictures.
    """
    if STDIO in (*sources, out):
        return _streams(sources, out)
    target = Path(out)
    into_folder = target.is_dir() or out.endswith(("/", os.sep))
    if len(sources) == 1 and _is_file_name(sources[0]) and not into_folder:
        return Plan((Job(Path(sources[0]), target),), single=True)
    if target.exists() and not target.is_dir():
        raise UsageError(f"found the file {target} as OUT of several pictures; expected a folder")
    if target.suffix.lower() in WRITTEN_PICTURES | WRITTEN_VIDEOS and not into_folder:
        raise UsageError(f"found {target} as OUT of several pictures; expected a folder (end it with / to make one)")
    jobs = {
        Job(source, target / _written_name(name))
        for given in sources
        for source, name in _found(given, target, own_name=len(sources) > 1)
    }
    _refuse_collisions(jobs)
    return Plan(tuple(sorted(jobs, key=lambda job: str(job.source))), single=False)


def _is_file_name(given: str) -> bool:
    path = Path(given)
    return not path.is_dir() and (path.exists() or not glob.has_magic(given))


def _streams(sources: Sequence[str], out: str) -> Plan:
    if len(sources) > 1 or (sources[0] != STDIO and not _is_file_name(sources[0])):
        raise UsageError(f"found {' '.join(sources)} {out}; expected one picture where - is IN or OUT")
    if out != STDIO and (out.endswith(("/", os.sep)) or Path(out).is_dir()):
        raise UsageError(f"found the folder {out} as OUT of standard input; expected the name of a file")
    source = None if sources[0] == STDIO else Path(sources[0])
    job = Job(source, None if out == STDIO else Path(out))
    if job.is_video and job.out is None:
        raise UsageError(f"found the video {source} and OUT -; expected the name of a file: videos need one")
    return Plan((job,), single=True)


def _found(given: str, target: Path, *, own_name: bool) -> Iterator[tuple[Path, Path]]:
    """Every file that an argument names, and its name below OUT."""
    path = Path(given)
    if path.is_dir():
        yield from _in_folder(path, target, Path(path.resolve().name) if own_name else Path())
    elif _is_file_name(given):
        yield path, Path(path.name)
    else:
        root = _plain_part(path)
        found = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if Path(name).is_file()]
        if not found:
            raise UsageError(f"found no file for the pattern {given}; expected at least one")
        yield from ((file, file.relative_to(root)) for file in found if not _within(file, target, root))


def _in_folder(folder: Path, target: Path, below: Path) -> Iterator[tuple[Path, Path]]:
    from lsast_engines.images import find_pictures

    for file in find_pictures(folder):
        if not _within(file, target, folder):
            yield file, below / file.relative_to(folder)


def _within(file: Path, target: Path, searched: Path) -> bool:
    """Whether `file` lies in OUT and OUT inside what is searched: an earlier painting, not a picture to paint."""
    inner = target.resolve()
    return inner != searched.resolve() and inner in file.resolve().parents


def _plain_part(pattern: Path) -> Path:
    """The leading folders of a pattern that hold no magic."""
    parts: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _written_name(name: Path) -> Path:
    """The name of an output: the source's, so that it is unique where that is, with a suffix that can be written."""
    suffix = name.suffix.lower()
    if suffix in VIDEOS:
        return name if suffix in WRITTEN_VIDEOS else name.with_name(name.name + ".mp4")
    return name if suffix in WRITTEN_PICTURES else name.with_name(name.name + ".png")


def _refuse_collisions(jobs: set[Job]) -> None:
    sources = defaultdict(list)
    for job in jobs:
        sources[job.out].append(str(job.source))
    faults = [f"{out}: {', '.join(sorted(several))}" for out, several in sources.items() if len(several) > 1]
    if faults:
        raise UsageError(fault_list("these outputs would be written twice; paint the sources in two calls:", faults))
