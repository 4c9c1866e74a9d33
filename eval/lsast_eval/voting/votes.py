"""Votes of people on pairs of results, their file, and the win rates of methods."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from lsast_engines.bundle.json_fields import parse_json
from lsast_engines.errors import LsastError, UsageError, fault_list

from ..metrics.intervals import wilson

FORMAT = 1
"""Format number of a line of votes."""

_LONGEST_LINE = 1 << 20
"""Bytes of a line, at most."""

log = logging.getLogger("lsast.eval")

Choice = Literal["left", "right", "tie"]
"""Possible votes."""


@dataclass(frozen=True)
class Vote:
    """One vote of one person on one pair; a line of the votes file."""

    artist: str
    """The artist that the results imitate."""
    content: str
    """File stem of the content."""
    left: str
    """Method whose result stood on the left."""
    right: str
    choice: Choice
    voter: str
    """Identifies the person; need not be a name."""
    seconds: float
    """From showing the pair to the answer."""
    time: str
    """ISO 8601, UTC."""


@dataclass(frozen=True)
class WinRate:
    """How often one method was preferred."""

    method: str
    other: str | None
    """The other method, or None for all others."""
    wins: int
    ties: int
    losses: int
    rate: float
    """(wins + ties / 2) / votes."""
    low: float
    """Wilson's interval of `rate`, as if every vote were drawn by itself."""
    high: float


def append_vote(path: Path, vote: Vote) -> None:
    """Add a line to the votes file, on the disk before this returns; on an error the file is as before.

    A line that an earlier writer could not finish is removed.

    Raises:
        OSError: the vote is not written, for example on a full disk.
    """
    line = (json.dumps({"format": FORMAT, **asdict(vote)}) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # another voter may write
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LONGEST_LINE))
        last = file.read().rpartition(b"\n")[2]
        if _is_unfinished(last):
            file.truncate(size := size - len(last))
        elif last:  # a whole line without its end
            line = b"\n" + line
        try:
            while line:
                line = line[file.write(line) :]  # in part if a disk gets full; the next call says so
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _is_unfinished(line: bytes) -> bool:
    """Whether a line without an end is a vote that was not written to its end."""
    begin = b'{"format": '
    return line != b"" and line[: len(begin)] == begin[: len(line)] and not isinstance(_vote(line), Vote)


def read_votes(paths: Iterable[Path]) -> list[Vote]:
    """All votes of some files, in order. An unfinished last line, of a writer that was killed, is left out and logged.

    Raises:
        LsastError: lines that are no votes, all at once.
        UsageError: a file that is not there.
    """
    votes: list[Vote] = []
    faults: list[str] = []
    for path in paths:
        if not path.is_file():
            raise UsageError(f"found no file {path}; expected votes that lsast-eval vote wrote")
        lines = path.read_bytes().split(b"\n")
        if _is_unfinished(lines[-1]):
            log.warning("%s, line %d: left out, it is not finished", path, len(lines))
            del lines[-1]
        for number, line in enumerate(lines, 1):
            if line.strip():
                found = _vote(line)
                if isinstance(found, Vote):
                    votes.append(found)
                else:
                    faults.append(f"{path}, line {number}: {found}")
    if faults:
        raise LsastError(fault_list("these lines are no votes:", faults))
    return votes


def win_rates(votes: Sequence[Vote], confidence: float = 0.95) -> list[WinRate]:
    """Every method against all others, then each pair, by falling rate; ties count half for either.

    Raises:
        UsageError: no votes.
    """
    if not votes:
        raise UsageError("found no votes; expected at least one")
    methods = sorted({name for vote in votes for name in (vote.left, vote.right)})
    overall = [_rate(votes, method, None, confidence) for method in methods]
    overall.sort(key=lambda rate: -rate.rate)
    rank = [rate.method for rate in overall]
    pairs = []
    for one, other in combinations(rank, 2):
        between = [vote for vote in votes if {vote.left, vote.right} == {one, other}]
        if between:
            pairs.append(_rate(between, one, other, confidence))
    return [*overall, *pairs]


def left_bias(votes: Sequence[Vote], confidence: float = 0.95) -> tuple[float, float, float] | None:
    """Share of decided votes for the left picture, with its interval; far from a half it shows a habit of the voter."""
    decided = [vote for vote in votes if vote.choice != "tie"]
    if not decided:
        return None
    left = sum(vote.choice == "left" for vote in decided)
    return (left / len(decided), *wilson(left, len(decided), confidence))


def _rate(votes: Sequence[Vote], method: str, other: str | None, confidence: float) -> WinRate:
    involved = [vote for vote in votes if method in (vote.left, vote.right)]
    preferred = [{"left": vote.left, "right": vote.right, "tie": None}[vote.choice] for vote in involved]
    count, wins, ties = len(preferred), preferred.count(method), preferred.count(None)
    points = wins + ties / 2
    low, high = wilson(points, count, confidence)
    return WinRate(method, other, wins, ties, count - wins - ties, points / count, low, high)


def _vote(line: bytes) -> Vote | str:
    """The vote, or what is wrong with the line."""
    try:
        data: Any = parse_json(line)
    except ValueError as error:
        return f"no JSON ({error})"
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        return f"expected an object with format {FORMAT}"
    types = {field.name: (int, float) if field.name == "seconds" else str for field in fields(Vote)}
    if data.keys() != types.keys():
        return f"found the fields {', '.join(data)}; expected {', '.join(types)}"
    if wrong := [name for name, kind in types.items() if not isinstance(data[name], kind)]:
        return f"found values of a wrong type in {', '.join(wrong)}"
    if not 0 <= data["seconds"] < math.inf:
        return f"found {data['seconds']} seconds; expected 0 or more"
    if data["choice"] not in get_args(Choice):
        return f"found the choice {data['choice']!r}; expected {', '.join(get_args(Choice))}"
    if data["left"] == data["right"]:
        return f"found {data['left']!r} against itself"
    return Vote(**data)
