"""What every command of `lsast-export` shares on a terminal: phases, `--json`, `--debug`."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from lsast_engines.cli import debug_option
from lsast_engines.errors import MissingExtraError

Command = TypeVar("Command", bound=Callable[..., Any])


def require_extra(*libraries: str) -> None:
    """Make sure that `libraries` of the extra `export` are there before anything heavy is imported.

    Raises:
        MissingExtraError: one is not installed.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, "export")


class Phases:
    """Names each phase on stderr as it begins, says how far it is, and keeps how long each took."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._starts: list[tuple[str, float]] = []

    def __call__(self, phase: str, detail: str = "") -> None:
        """Begin `phase`, or with `detail` say how far it is."""
        now = time.perf_counter() - self._began
        if not detail:
            self._starts.append((phase, now))
        click.echo(f"[{now:6.1f} s] {detail and '  '}{detail or phase}", err=True)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in order; the last one ends now."""
        ends = [start for _, start in self._starts[1:]] + [time.perf_counter() - self._began]
        return {phase: round(end - start, 3) for (phase, start), end in zip(self._starts, ends, strict=True)}


def common(command: Command) -> Command:
    """Options that every command has."""
    json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the path.")
    return json_option(debug_option(command))
