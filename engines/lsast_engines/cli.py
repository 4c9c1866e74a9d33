"""The common part of all command lines: errors and log records on stderr, exit statuses, options.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted (`LsastError.exit_code`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import click

from .errors import LsastError, UsageError, shown
from .removed import RENAMED, removal

USAGE = UsageError.exit_code
"""Exit status of a wrong usage."""

_DEBUG, _JSON = "lsast.debug", "lsast.json"


class Command(click.Command):
    """A command whose failures are one line a fault; a traceback stands before it with `debug_option`.

    Old names of its options still work (`RENAMED`), or are refused with what to use instead (`REMOVED`).
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`."""
        known = {name for parameter in self.params for name in parameter.opts}
        for index, text in enumerate(args):
            name, equals, value = text.partition("=")
            if name in known:
                continue
            if new := next((new for new in RENAMED.get(name, ()) if new in known), None):
                args[index] = new + equals + value
            elif name.startswith("--") and (gone := removal(name)):
                raise click.UsageError(gone)
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """See `click.Command`."""
        # The process is ours here: Pillow warns of oddities in pictures that can be read.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """See `click.Command`."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            fail(f"{error.format_message()} (--help lists all options)", USAGE)

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command`."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            fail(f"{error.format_message()} (--help lists all options)", USAGE)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            if isinstance(error, LsastError):
                fail(str(error), error.exit_code)
            if isinstance(error, KeyboardInterrupt):
                fail("interrupted", 130)
            if isinstance(error, OSError) and error.strerror:  # a full disk, a name that is too long, no permission …
                fail(": ".join([*(str(name) for name in [error.filename] if name is not None), error.strerror]), 1)
            if isinstance(error, MemoryError):
                fail(
                    f"not enough memory{f' ({error})' if str(error) else ''}; close other programs, or ask for less", 1
                )
            fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


class Group(Command, click.Group):
    """A group whose failures, and those of its commands, are one line a fault."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of `args`; one that was removed is refused with what to do instead."""
        if gone := removal(f"{self.name} {args[0]}"):
            raise UsageError(gone)
        if args[0] not in self.commands:
            args = [next((new for new in RENAMED.get(args[0], ()) if new in self.commands), args[0]), *args[1:]]
        return super().resolve_command(ctx, args)


def fail(message: str, status: int) -> NoReturn:
    """Print a message on stderr, what does not print escaped (`errors.shown`), and end with an exit status."""
    click.echo("\n".join(map(shown, f"Error: {message}".split("\n"))), err=True)
    raise click.exceptions.Exit(status)


OptionDecorator = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What adds one or more options to a command."""


def combine_options(*options: OptionDecorator) -> OptionDecorator:
    """One decorator that adds all `options` to a command; ``--help`` lists the last one first."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in options:
            command = option(command)
        return command

    return add


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Log more, and show tracebacks."
)
"""Adds `--debug` to a command; no parameter of the function, see `debugging`."""


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_JSON] = True


json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_remember_json, help="Print one JSON object on stdout."
)
"""Adds `--json` to a command; no parameter of the function, see `print_result`."""


def print_result(facts: Mapping[str, Any], text: object) -> None:
    """Print the result on stdout: `facts` as one JSON object with `--json`, else `text`."""
    click.echo(json.dumps(facts, ensure_ascii=False) if click.get_current_context().meta.get(_JSON) else text)


def debugging() -> bool:
    """Whether the command that runs was given `--debug`."""
    return bool(click.get_current_context().meta.get(_DEBUG))


class _Formatter(logging.Formatter):
    """Escapes what does not print in the messages."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return "\n".join(map(shown, super().formatMessage(record).split("\n")))


@contextlib.contextmanager
def log_to_stderr(level: int = logging.INFO) -> Iterator[None]:
    """Show what ``lsast`` logs from `level` on (all, with `--debug`) above the progress bars, while the block runs."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    logger, handler = logging.getLogger("lsast"), logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    before = logger.level
    logger.setLevel(logging.DEBUG if debugging() else level)
    logger.addHandler(handler)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
