"""`lsast-serve`: start the server, say where it listens, and end it in good order."""

import contextlib
import logging
import os
import socket
import time
import webbrowser
from collections.abc import Callable
from dataclasses import fields
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from lsast_engines.bundle.location import find_bundle
from lsast_engines.cli import Command, debug_option, echo, log_to_stderr
from lsast_engines.declared_options import rules_of
from lsast_engines.errors import LsastError, MissingExtraError, UsageError

from .settings import LOOPBACK, PREFIX, Settings, unknown_variables

SECTIONS = {
    "Address": ("host", "port", "token", "allowed_hosts", "show"),
    "Bundle and backend": ("bundle", "backend", "device", "threads", "compute_dtype", "preset", "batch"),
    "Limits": tuple(
        name for name in rules_of(Settings) if name.startswith(("max_", "keep_", "queue")) or "seconds" in name
    ),
}
"""Sections of the help and their options."""


class _Setting(click.Option):
    def get_error_hint(self, ctx: click.Context | None) -> str:
        """The name in messages: that of the variable, where the value is of the environment. Kubernetes gives some."""
        found = ctx.get_parameter_source(str(self.name)) if ctx else None
        return str(self.envvar) if found is ParameterSource.ENVIRONMENT else super().get_error_hint(ctx)


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for each field of `Settings`, which an environment variable can give, too."""
    for field in reversed(fields(Settings)):
        rule = rules_of(Settings)[field.name]
        kind, text, range_ = rule.type, rule.help, rule.range
        allowed = [str(range_)] if range_ and range_.low < range_.high else []
        default = [f"default: {field.default}"] if field.default not in ("", 0) else []
        extra = f" [{'; '.join(allowed + default)}]" if allowed or default else ""
        command = click.option(
            f"--{field.name.replace('_', '-')}",
            cls=_Setting,
            type=kind,
            default=field.default,
            metavar={str: "TEXT", int: "N", float: "NUMBER"}[kind],
            envvar=PREFIX + field.name.upper(),
            help=text + extra,
        )(command)
    return command


@click.command(
    "lsast-serve",
    cls=Command,
    sections=SECTIONS,
    epilog=f"Every option can be given by the environment, too: {PREFIX}PORT=8080 is --port 8080.",
)
@setting_options
@click.option("--open", "show", is_flag=True, help="Open the page in a browser.")
@debug_option
def main(show: bool, **settings: Any) -> None:
    """Paint over HTTP: a page for people, an API for programs.

    \b
      lsast-serve --open
      LSAST_SERVE_TOKEN=secret lsast-serve --host 0.0.0.0 --port 8080

    The address is printed when the server listens. Ctrl-C or SIGTERM lets it finish what it has accepted; a second
    Ctrl-C ends it at once.
    """
    for fault in unknown_variables(os.environ):
        echo(fault, err=True)
    serve(Settings(**settings), show)


def serve(settings: Settings, show: bool = False) -> None:
    """Run a server until a signal ends it.

    Args:
        settings: of the server.
        show: open the page in a browser.

    Raises:
        MissingExtraError: a library of the extra `server` is not installed.
        BundleError: there is no such bundle.
        UsageError: the address cannot be listened on.
        LsastError: the engines cannot be opened.
    """
    try:
        import uvicorn

        from .app import create_app
        from .process import WorkerProcess
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "server") from error

    class Server(uvicorn.Server):
        """Finishes what was accepted before it ends."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """See `uvicorn.Server`."""
            super().handle_exit(sig, frame)
            if self.force_exit:  # asked for: a traceback of each request that is cut off says nothing
                logging.getLogger("uvicorn.error").disabled = True

        async def on_tick(self, counter: int) -> bool:
            """See `uvicorn.Server`."""
            if not await super().on_tick(counter):
                return False
            end = time.monotonic() + settings.drain_seconds
            app.state.draining = True
            await app.state.jobs.drain(settings.drain_seconds, lambda: self.force_exit or bool(failure))
            await app.state.jobs.close()
            config.timeout_graceful_shutdown = max(1, round(end - time.monotonic()))
            return True

    def stop(error: LsastError) -> None:
        failure.append(error)
        server.should_exit = True

    find_bundle(settings.bundle or None)  # the worker opens it, when the address is printed
    failure: list[LsastError] = []
    app = create_app(settings, lambda: WorkerProcess(settings, stop))
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False)
    server = Server(config)
    with log_to_stderr(logging.WARNING, "uvicorn", "asyncio", "python_multipart"), _listen(settings) as listener:
        address = _address(settings.host, listener.getsockname()[1])
        echo(address)
        if settings.host not in LOOPBACK and not settings.token:
            echo("everyone who reaches this address can paint; --token asks for a token", err=True)
        if show:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):  # raised when all is done
            try:
                server.run([listener])
            finally:
                logging.getLogger("uvicorn.error").disabled = False
    if failure:
        raise failure[0]


def _listen(settings: Settings) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot listen on {settings.host}, port {settings.port} ({reason}); --port 0 takes a free one"
        ) from None


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    main()
