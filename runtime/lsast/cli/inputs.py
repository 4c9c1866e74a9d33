"""The arguments IN and OUT of `lsast-run`: files, folders, patterns and `-`, resolved before anything is painted.

No picture is decoded here, so that all faults of the arguments are reported before the first painting.
"""

import glob
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from lsast_engines.cli import describe
from lsast_engines.errors import LsastError, PictureError, UsageError, fault_list, shown

from ..images.formats import ANIMATIONS, VIDEOS, WRITTEN_PICTURES, WRITTEN_VIDEOS, is_animated, video_format

_log = logging.getLogger("lsast.cli")

_WRITTEN = {*WRITTEN_PICTURES, *WRITTEN_VIDEOS}

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
        """Whether the source is a video, by its suffix, or an animated picture whose frames OUT can hold."""
        if self.source is None or self.source.suffix.lower() in VIDEOS:
            return self.source is not None
        return self.out is not None and bool(video_format(self.source, self.out)) and is_animated(self.source)


@dataclass(frozen=True)
class Plan:
    """All jobs of one call."""

    jobs: tuple[Job, ...]
    single: bool
    """Whether the call names one picture and one file for it. Then an existing file is replaced, and a failure ends the
    call; otherwise existing paintings are skipped, and failures are listed at the end."""
    failures: dict[str, str] = field(default_factory=dict)
    """What cannot be painted, an IN argument or a file that it names, and why."""
    left_out: str = ""
    """How many files of the folders are no pictures, by suffix; empty for none."""


def plan_jobs(sources: Sequence[str], out: str) -> Plan:
    """Find the pictures and videos that the arguments of a call name, and name their outputs.

    - A file is painted to the file OUT, or into OUT if that is a folder.
    - Of several sources OUT is a folder. Names stay; `.png` or `.mkv` is added to formats that are not written.
    - A folder is searched at any depth for pictures (no hidden ones, no videos, nothing in OUT). Its structure is kept:
      of a single folder directly below OUT, of several below OUT and the folder's name.
    - A pattern of `*`, `?`, `[…]`, `**` finds files, unless a file has that name. Their structure is kept from the
      first folder with such a character.
    - `-` is standard input or output, and stands alone.

    Two sources with the same output, an output that is a source, a file that is not there, a folder without pictures
    and a pattern without files are failures; they do not end the others. If nothing is left to paint, they are raised:
    a `PictureError` for such a file or folder, else a `UsageError`, as for an OUT that cannot hold the paintings.
    """
    if STDIO in (*sources, out):
        return _stdio_plan(sources, out)
    target = Path(out)
    is_folder = target.is_dir() or out.endswith(("/", os.sep))
    single = len(sources) == 1 and _is_file_name(sources[0]) and not is_folder
    failures: dict[str, str] = {}
    others: list[Path] = []
    found: list[tuple[Path, Path]] = []
    errors: list[Exception] = []
    for given in sources:
        try:
            found += _find(given, target, others, below_own_name=len(sources) > 1)
        except (LsastError, OSError) as error:
            errors.append(error)
            failures[given] = describe(error)
    if single and not failures:
        return Plan((Job(Path(sources[0]), target),), single=True)
    if not single and target.exists() and not target.is_dir():
        raise UsageError(f"found the file {target} as OUT of several pictures; expected a folder")
    if not single and not is_folder and target.suffix.lower() in _WRITTEN:
        raise UsageError(f"found {target} as OUT of several pictures; expected a folder (end it with / to make one)")
    jobs, clashes = _without_clashes([Job(source, target / _output_name(source, name)) for source, name in found])
    failures |= clashes
    if errors and len(failures) == 1 and not jobs:
        raise errors[0]
    if failures and not jobs:
        kind = UsageError if clashes or isinstance(errors[0], UsageError) else PictureError
        raise kind(fault_list("found nothing to paint:", [named(*failure) for failure in failures.items()]))
    suffixes = Counter(path.suffix.lower() or "without a suffix" for path in others)
    left_out = ", ".join(f"{count} {shown(suffix)}" for suffix, count in sorted(suffixes.items()))
    return Plan(jobs, single=False, failures=failures, left_out=left_out)


def default_output(source: str) -> str:
    """OUT of a call that names none: beside the source, ``photo-painted.jpg`` of ``photo.jpg``; a `UsageError` for
    standard input, a pipe, or a pattern."""
    path = Path(source)
    pipe = path.exists() and not path.is_file() and not path.is_dir()
    if source == STDIO or pipe or not (path.is_dir() or _is_file_name(source)):
        raise UsageError(f"found {source} and no OUT; expected one: lsast-run IN OUT")
    if path.is_dir():
        return f"{path.resolve()}-painted/"
    name = _output_name(path, path)
    return str(name.with_name(f"{path.stem}-painted{name.suffix}"))


def named(name: str, reason: str) -> str:
    """The line that says why a file cannot be painted, with its name once."""
    name, reason = shown(name), shown(reason)
    word = rf"(?<![^\s'\"(]){re.escape(name)}(?![^\s'\",:;)])"  # photo.jpg is not named by photo.jpg.png
    return reason if re.search(word, reason) else f"{name}: {reason}"


def _stdio_plan(sources: Sequence[str], out: str) -> Plan:
    if len(sources) > 1 or (sources[0] != STDIO and not _is_file_name(sources[0])):
        raise UsageError(f"found {' '.join(sources)} {out}; expected one picture where - is IN or OUT")
    if out != STDIO and (out.endswith(("/", os.sep)) or Path(out).is_dir()):
        raise UsageError(f"found the folder {out} as OUT of standard input; expected the name of a file")
    job = Job(*(None if name == STDIO else Path(name) for name in (sources[0], out)))
    if job.is_video and job.out is None:
        raise UsageError(f"found the video {job.source} and OUT -; expected the name of a file: videos need one")
    if job.source is not None:
        require_input(job.source)
    return Plan((job,), single=True)


def _without_clashes(jobs: list[Job]) -> tuple[tuple[Job, ...], dict[str, str]]:
    """The jobs, sorted, without those that share an output or would replace a source; and why these are left out."""
    sources_of: defaultdict[Path | None, dict[str, Job]] = defaultdict(dict)
    for job in sorted(jobs, key=lambda job: str(job.source)):
        sources_of[job.out].setdefault(os.path.realpath(str(job.source)), job)
    sources = {os.path.realpath(str(job.source)) for job in jobs}
    kept: list[Job] = []
    clashes: dict[str, str] = {}
    for out, by_path in sources_of.items():
        names = [str(job.source) for job in by_path.values()]
        if os.path.realpath(str(out)) in sources:
            clashes |= dict.fromkeys(names, f"its painting would replace the picture {out}; expected another OUT")
        elif len(names) > 1:
            for name in names:
                others = ", ".join(other for other in names if other != name)
                clashes[name] = f"its output, {out}, is that of {others} as well; paint them in two calls"
        else:
            kept += by_path.values()
    return tuple(sorted(kept, key=lambda job: str(job.source))), clashes


def _is_file_name(given: str) -> bool:
    path = Path(given)
    return not path.is_dir() and (path.exists() or not glob.has_magic(given))


def require_input(path: Path) -> None:
    """Raise a `PictureError` if a picture or video is not there."""
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error})"
        raise PictureError(f"found no file {path}{reason}; expected a picture, a video or a folder") from None


def _find(given: str, target: Path, others: list[Path], *, below_own_name: bool) -> list[tuple[Path, Path]]:
    """Every file that an IN argument names, and its name below OUT; `others` gets the files that are no pictures."""
    root = path = Path(given)
    below = Path()
    unread: list[Path] = []
    if path.is_dir():
        from lsast_engines.images import find_pictures

        files = find_pictures(path, unread)
        below = Path(path.resolve().name) if below_own_name else below
    elif _is_file_name(given):
        require_input(path)
        return [(path, Path(path.name))]
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
        try:
            found = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if not Path(name).is_dir()]
        except RecursionError:
            raise UsageError(f"found folders too deep for the pattern {given}; expected the name of a folder") from None
        files = [path for path in found if path.is_file()]
        for path in sorted({*found} - {*files}):
            _log.warning("%s is left out: it is no file", shown(path))
        if not files:
            raise UsageError(f"found no file for the pattern {given}; expected at least one")
    # Files in OUT are earlier paintings if OUT lies inside the searched folder.
    out = target.resolve()
    if root.resolve() in out.parents:
        files, unread = ([file for file in some if out not in file.resolve().parents] for some in (files, unread))
    others += unread
    return [(file, below / file.relative_to(root)) for file in files]


def _output_name(source: Path, name: Path) -> Path:
    """The name of an output: the source's, with a suffix added if its format is not written."""
    suffix = name.suffix.lower()
    if suffix in _WRITTEN or (suffix in ANIMATIONS and is_animated(source)):
        return name
    return name.with_name(name.name + (".mkv" if suffix in VIDEOS else ".png"))
