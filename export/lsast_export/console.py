"""What every command of `lsast-export` shares on a terminal: errors in a line each, phases, `--json`, `--debug`."""

from __future__ import annotations

import importlib.util
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from lsast_engines.errors import LsastError, MissingExtraError, UsageError
from lsast_engines.removed import removal

Command = TypeVar("Command", bound=Callable[..., Any])


class Group(click.Group):
    """A group whose failures are one line a fault, with a traceback only on `--debug`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of `args`; one that was removed is refused with what to do instead."""
        if gone := removal(f"{self.name} {args[0]}"):
            raise UsageError(gone)
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            fail(f"{error.format_message()} (--help lists all options)", UsageError.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            fail(f"{error.format_message()} (--help lists all options)", UsageError.exit_code)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.meta.get("lsast.debug"):
                traceback.print_exc()
            if isinstance(error, LsastError):
                fail(str(error), error.exit_code)
            if isinstance(error, KeyboardInterrupt):
                fail("interrupted", 130)
            fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


def fail(message: str, status: int) -> NoReturn:
    """Say why, and leave with `status`."""
    click.echo(f"Error: {message}", err=True)
    raise click.exceptions.Exit(status)


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


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["lsast.debug"] = True


def common(command: Command) -> Command:
    """Options that every command has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the path."),
        click.option(
            "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show a traceback on errors."
        ),
    ):
        command = option(command)
    return command
