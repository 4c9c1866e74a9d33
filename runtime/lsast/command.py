"""How the command lines of the runtime fail: one line a fault on stderr, and an exit status that says what kind."""

from __future__ import annotations

import traceback
from typing import Any, NoReturn

import click

USAGE = 2
"""Exit status of a wrong usage."""


class Command(click.Command):
    """A command whose failures are one line a fault, with a traceback only on `--debug`."""

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
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:
            from lsast_engines.errors import LsastError

            if ctx.params["debug"]:
                traceback.print_exc()
            if isinstance(error, LsastError):
                fail(str(error), error.exit_code)
            if isinstance(error, KeyboardInterrupt):
                fail("interrupted", 130)
            fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


def fail(message: str, status: int) -> NoReturn:
    """Print one line on stderr and end with an exit status."""
    click.echo(f"Error: {message}", err=True)
    raise click.exceptions.Exit(status)
