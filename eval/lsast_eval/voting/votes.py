"""Votes of people on pairs of results, their file, and the win rates of methods."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from lsast_engines.errors import LsastError, UsageError, fault_list

from ..metrics.intervals import wilson

FORMAT = 1
"""Format number of a line of votes."""

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
    """Add a line to the votes file: in one write, and on the disk before this returns."""
    line = (json.dumps({"format": FORMAT, **asdict(vote)}, ensure_ascii=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_votes(paths: Iterable[Path]) -> list[Vote]:
    """All votes of some files, in order.

    Raises:
        LsastError: lines that are no votes, all at once.
        UsageError: a file that is not there.
    """
    votes: list[Vote] = []
    faults: list[str] = []
    for path in paths:
        if not path.is_file():
            raise UsageError(f"found no file {path}; expected votes that lsast-eval vote wrote")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
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
    outcome = {"win": 0, "tie": 0, "loss": 0}
    for vote in votes:
        if method in (vote.left, vote.right):
            preferred = {"left": vote.left, "right": vote.right, "tie": None}[vote.choice]
            outcome["tie" if preferred is None else "win" if preferred == method else "loss"] += 1
    count = sum(outcome.values())
    points = outcome["win"] + outcome["tie"] / 2
    low, high = wilson(points, count, confidence)
    return WinRate(method, other, outcome["win"], outcome["tie"], outcome["loss"], points / count, low, high)


def _vote(line: str) -> Vote | str:
    """The vote, or what is wrong with the line."""
    try:
        data: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return f"no JSON ({error})"
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        return f"expected an object with format {FORMAT}"
    types = {field.name: (int, float) if field.name == "seconds" else str for field in fields(Vote)}
    if data.keys() != types.keys():
        return f"found the fields {', '.join(data)}; expected {', '.join(types)}"
    if wrong := [name for name, kind in types.items() if not isinstance(data[name], kind)]:
        return f"found values of a wrong type in {', '.join(wrong)}"
    if data["choice"] not in get_args(Choice):
        return f"found the choice {data['choice']!r}; expected {', '.join(get_args(Choice))}"
    if data["left"] == data["right"]:
        return f"found {data['left']!r} against itself"
    return Vote(**data)
