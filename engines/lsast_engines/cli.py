"""The common part of all command lines: errors and log records on stderr, exit statuses, options.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted (`LsastError.exit_code`).
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO

import click
from click.shell_completion import CompletionItem

from .environment import require_extra
from .errors import Lines, LsastError, UsageError, did_you_mean, shown
from .files import NO_ROOM
from .removed import RENAMED, removal

USAGE = UsageError.exit_code
"""Exit status of a wrong usage."""

OptionDecorator = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What adds one or more options to a command."""

_READER_GONE = 141  # exit status of a program whose reader closed the pipe: that of the signal SIGPIPE
_LONGEST = 1000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # and line breaks

_HELP = {"-h", "--help", "-V", "--version"}

_DEBUG, _JSON, _QUIET, _STDOUT_FAULT, _VERBOSE = (
    f"lsast.{name}" for name in ("debug", "json", "quiet", "stdout", "verbose")
)


def _backends() -> Iterable[str]:
    from .backends.registry import EXTRAS

    return ("auto", *EXTRAS)


def _bundles() -> Iterable[str]:
    from .bundle.location import bundle_names

    return bundle_names()


_SUGGESTED: Mapping[str, Callable[[], Iterable[str]]] = {
    "backend": _backends,
    "base": _bundles,
    "bundle": _bundles,
    "compute_dtype": lambda: ("auto", "bf16", "fp16", "fp32"),
    "device": lambda: ("auto", "cpu", "cuda"),
}
"""What a shell completes of the parameters of these names, which may be other texts as well."""


class _SuggestedText(click.types.StringParamType):
    """The text of a parameter in `_SUGGESTED`; a bundle may be any folder, too."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """See `click.ParamType`."""
        names = _SUGGESTED[param.name or ""]
        found = [CompletionItem(name) for name in names() if name.startswith(incomplete)]
        return [*found, *([CompletionItem(incomplete, type="dir")] if names is _bundles else [])]


class Command(click.Command):
    """A command whose failures are one line a fault; a traceback stands before it with `debug_option`.

    Old names of its options still work (`RENAMED`), or are refused with what to use instead (`REMOVED`).

    Args:
        requires: an extra and libraries of it, without which nothing but the help works; of a group, those that it
            needs when none of its commands is named.
        sections: the parameters in each section of the help, by its title; "Other" takes those that are in none.
    """

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Collection[str]] | None = None,
        requires: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        kwargs["context_settings"] = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}
        super().__init__(*args, **kwargs)
        self._sections = sections or {}
        self._requires = requires
        for parameter in self.params:
            if parameter.name in _SUGGESTED and type(parameter.type) is click.types.StringParamType:
                parameter.type = _SuggestedText()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Command`."""
        section_of = {name: title for title, names in self._sections.items() for name in names}
        others = "Other" if self._sections else "Options"
        records: dict[str, list[tuple[str, str]]] = {title: [] for title in (*self._sections, others)}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                records[section_of.get(parameter.name or "", others)].append(record)
        for title, rows in records.items():
            with formatter.section(title):
                formatter.write_dl(rows)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`."""
        named = args and isinstance(self, click.Group) and any(name in self.commands for name in args)
        if self._requires and not named and not ctx.resilient_parsing and not _HELP & {*args}:
            require_extra(*self._requires)
        known = {name for parameter in self.params for name in parameter.opts}
        if "" in args or any(text.endswith("=") and text[:-1] in known for text in args):
            raise click.UsageError("found an empty argument; expected a value (is a variable of the shell not set?)")
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
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed by the caller; the next file would get its descriptor
                setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """See `click.Command`."""
        try:
            return super().make_context(*args, **kwargs)
        except (click.exceptions.NoArgsIsHelpError, click.exceptions.Exit, click.exceptions.Abort):
            raise
        except click.UsageError as error:
            _fail_for_usage(error)
        except LsastError as error:
            fail(Lines(error), error.exit_code)
        except RuntimeError as error:  # --version of a folder that is not installed
            fail(describe(error), 1)
        except OSError as error:  # --help into a closed pipe
            _fail_for_stdout(error)

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command`."""
        try:
            returned = super().invoke(ctx)
        except click.UsageError as error:
            _fail_for_usage(error)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            if isinstance(error, KeyboardInterrupt):
                fail("interrupted", 130)
            if isinstance(error, LsastError):
                fail(Lines(error), error.exit_code)
            fail(describe(error), 1)
        if fault := ctx.meta.get(_STDOUT_FAULT):
            _fail_for_stdout(fault)
        return returned


class Group(Command, click.Group):
    """A group whose failures, and those of its commands, are one line a fault."""

    synonyms: Mapping[str, str] = {}
    """Commands by words that users may try instead."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of `args`; one that was removed is refused with what to do instead."""
        if gone := removal(f"{self.name} {args[0]}"):
            raise UsageError(gone)
        names = self.list_commands(ctx)
        name = next((new for new in (args[0], *RENAMED.get(args[0], ())) if new in names), None)
        if name is None and not args[0].startswith("-"):
            near = did_you_mean(self.synonyms.get(args[0], args[0]), names)
            raise UsageError(f"found command {args[0]!r}; expected {', '.join(names)}{near}")
        return super().resolve_command(ctx, [name or args[0], *args[1:]])


def describe(error: Exception) -> str:
    """What a user is told of an error, in one line: an `LsastError`'s text, what the system says, or that it was not
    expected."""
    if isinstance(error, LsastError):
        return f"{error}"
    if isinstance(error, OSError) and error.strerror:  # a full disk, a name that is too long, no permission …
        room = "; expected a folder with room" if error.errno in NO_ROOM else ""
        return ": ".join([*(str(name) for name in [error.filename] if name is not None), error.strerror]) + room
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({error})' if str(error) else ''}; close other programs, or ask for less"
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)"


def echo(*lines: object, err: bool = False) -> None:
    """Print each of `lines` as one line on stdout, or on stderr.

    What does not print is escaped (`errors.shown`) on stderr and on a terminal. Elsewhere control characters are, and
    names of files keep their other bytes, also those that are no text. Letters that the stream's encoding lacks are
    escaped.
    """
    stream = sys.stderr if err else sys.stdout
    if err or stream.isatty():
        texts = [shown(line) for line in lines]
    else:
        texts = [_CONTROL.sub(lambda found: shown(found[0]), str(line)) for line in lines]
    text = "".join(f"{line}\n" for line in texts)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        data = text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode(encoding, "backslashreplace")
    write_stdout(data, err)


def write_stdout(data: bytes, err: bool = False) -> None:
    """Write bytes to stdout, or to stderr. If the reader is gone or the disk is full, these and all later bytes of the
    stream are dropped, and the command goes on; for stdout, the exit status says so at the end."""
    try:
        click.echo(data, nl=False, err=err)
    except OSError as error:
        _abandon(sys.stderr if err else sys.stdout)
        if not err and (context := click.get_current_context(silent=True)):
            context.meta.setdefault(_STDOUT_FAULT, error)


def _abandon(stream: TextIO) -> None:
    """Let a stream's file be the null device, also for what the interpreter writes when it ends."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as null:  # a stream without a descriptor
        os.dup2(null.fileno(), stream.fileno())


def _fail_for_stdout(fault: OSError) -> NoReturn:
    _abandon(sys.stdout)
    if fault.errno == errno.EPIPE:
        raise click.exceptions.Exit(_READER_GONE)
    fail(f"standard output: {fault.strerror}", 1)


def is_closed(stream: object) -> bool:
    """Whether a standard stream was closed when the command was started (see `Command.main`)."""
    return getattr(stream, "name", None) == os.devnull


def fail(message: str, status: int) -> NoReturn:
    """Print a message on stderr, its lines shortened to `_LONGEST` letters, and end with an exit status."""
    lines = message.split("\n") if isinstance(message, Lines) else [shown(message)]
    lines[0] = f"Error: {lines[0]}"
    echo(*(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…" for line in lines), err=True)
    raise click.exceptions.Exit(status)


def _fail_for_usage(error: click.UsageError) -> NoReturn:
    # click puts the choices of a missing option on lines of their own.
    fail(f"{error.format_message().replace(chr(10) + chr(9), ' ')} (--help lists all options)", USAGE)


def combine_options(*options: OptionDecorator) -> OptionDecorator:
    """One decorator that adds all `options` to a command; ``--help`` lists the last one first."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in options:
            command = option(command)
        return command

    return add


def _flag(key: str, *names: str, text: str) -> OptionDecorator:
    """An option that is no parameter of the function: it sets `key` in the context's `meta`."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta[key] = True

    return click.option(*names, is_flag=True, expose_value=False, callback=remember, help=text)


debug_option = combine_options(
    click.version_option(None, "-V", "--version", package_name="lsast", message="lsast %(version)s"),
    _flag(_DEBUG, "--debug", text="Log everything, and show tracebacks."),
    _flag(_QUIET, "-q", "--quiet", text="Log errors only, and show no progress."),
    _flag(_VERBOSE, "-v", "--verbose", text="Log more."),
)
"""Adds `--debug`, `--quiet`, `--verbose` and `--version` to a command; no parameters of the function, see `quiet`."""

json_option = _flag(_JSON, "--json", text="Print JSON objects on stdout, one a line.")
"""Adds `--json` to a command; no parameter of the function, see `print_result`."""


def print_result(facts: Mapping[str, Any], *lines: object) -> None:
    """Print the result on stdout: `facts` as one JSON object with `--json`, else `lines` (see `echo`)."""
    echo(*([json.dumps(finite_json(facts))] if as_json() else lines))


def finite_json(value: Any) -> Any:
    """`value` with None in place of NaN and infinite numbers, which JSON does not have (RFC 8259, section 6)."""
    if isinstance(value, Mapping):
        return {key: finite_json(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json() -> bool:
    """Whether the command that runs was given `--json`."""
    return bool(click.get_current_context().meta.get(_JSON))


def quiet() -> bool:
    """Whether the command that runs was given `--quiet`, and shall show no progress."""
    return bool(click.get_current_context().meta.get(_QUIET))


class _EchoHandler(logging.Handler):
    """Prints records on stderr, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            trace = traceback.format_exception(record.exc_info[1]) if record.exc_info else []
            echo(record.getMessage(), *"".join(trace).splitlines(), err=True)


@contextlib.contextmanager
def log_to_stderr(level: int = logging.INFO, *others: str) -> Iterator[None]:
    """Show what ``lsast`` and the loggers `others` log from `level` on above the progress bars, while the block runs.

    With `--verbose` from one level lower on, with `--debug` all, with `--quiet` errors.
    """
    handler, given = _EchoHandler(), click.get_current_context().meta
    before = {logger: logger.level for logger in map(logging.getLogger, ("lsast", *others))}
    level = logging.ERROR if quiet() else level - 10 if given.get(_VERBOSE) else level
    for logger in before:
        logger.setLevel(logging.DEBUG if given.get(_DEBUG) else level)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level_before in before.items():
            logger.removeHandler(handler)
            logger.setLevel(level_before)
