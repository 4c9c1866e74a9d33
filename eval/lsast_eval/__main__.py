"""Entry of ``lsast-eval`` and ``python -m lsast_eval``: every failure is one line on stderr and an exit code."""

from __future__ import annotations

import sys

import click

from lsast_engines.errors import LsastError

from .cli import command


def main(arguments: list[str] | None = None) -> None:
    """Run ``lsast-eval`` and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted; a traceback only with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = command.main(args=arguments, prog_name="lsast-eval", standalone_mode=False)
    except click.Abort:
        _fail("interrupted", 130)
    except click.ClickException as error:
        _fail(f"{error.format_message()} (--help lists all options)", error.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            raise
        known = isinstance(error, (LsastError, OSError))
        message = str(error) if known else f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        _fail(message, error.exit_code if isinstance(error, LsastError) else 1)
    # With standalone_mode off, click returns the code of --help and the like instead of exiting.
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
