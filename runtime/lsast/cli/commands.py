"""`lsast`: one name for all commands; what it calls is imported when it is called, so that `--help` answers at once."""

import logging
import pkgutil
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import click

from lsast_engines.cli import Command, Group, debug_option, echo, json_option, log_to_stderr, print_result
from lsast_engines.errors import StyleError

_OTHERS = {
    "run": ("lsast.cli.main:main", "Repaint pictures and videos (lsast-run)."),
    "serve": ("lsast.server.cli:main", "Paint over HTTP: a page and an API (lsast-serve)."),
    "train": ("lsast_train.cli.main:command", "Learn an artist's prompts from pictures (lsast-train)."),
    "export": ("lsast_export.cli.main:main", "Bake styles; export, check and change bundles (lsast-export)."),
    "eval": ("lsast_eval.cli:main", "Score folders of paintings (lsast-eval)."),
}
"""The commands that have a module of their own: where they are, and their line in the help."""

_SYNONYMS = {
    **dict.fromkeys(("paint", "repaint", "stylize", "stylise", "apply", "convert"), "run"),
    **dict.fromkeys(("server", "web", "start"), "serve"),
    **dict.fromkeys(("learn", "fit"), "train"),
    **dict.fromkeys(("bake", "build", "compile"), "export"),
    **dict.fromkeys(("score", "test"), "eval"),
    **dict.fromkeys(("list", "ls"), "styles"),
    **dict.fromkeys(("clean", "clear", "prune"), "cache"),
    **dict.fromkeys(("check", "info", "status"), "doctor"),
}


class Commands(Group):
    """The commands of this file, and `_OTHERS`, which are imported when they are called."""

    synonyms = MappingProxyType(_SYNONYMS)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group`."""
        return [*_OTHERS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See `click.Group`."""
        if cmd_name not in _OTHERS:
            return super().get_command(ctx, cmd_name)
        command: click.Command = pkgutil.resolve_name(_OTHERS[cmd_name][0])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Group`."""
        own = [(name, command.get_short_help_str(100)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl([*((name, text) for name, (_, text) in _OTHERS.items()), *own])


@click.group("lsast", cls=Commands)
@debug_option
def main() -> None:
    """Repaint pictures in a learned artist's style.

    \b
      lsast run photo.jpg painting.png --style monet
      lsast styles --sheet styles.png

    Each command has a --help of its own.
    """


@main.command("styles", cls=Command)
@click.argument("picture", metavar="[IN]", required=False, type=click.Path(path_type=Path))
@click.option("--bundle", metavar="PATH", help="Folder or name of the bundle. [default: $LSAST_BUNDLE, else mini]")
@click.option("-o", "--sheet", metavar="OUT", help="Paint IN small in every style, all on one sheet.")
@json_option
@debug_option
def styles(picture: Path | None, bundle: str | None, sheet: str | None) -> None:
    """List the styles of a bundle, or paint them on a sheet.

    Your own styles that fit the bundle are among them. Without IN the sheet shows a lighthouse.

    \b
      lsast styles
      lsast styles photo.jpg --sheet styles.png
    """
    from lsast_engines.bundle.bundle import Bundle, find_bundle
    from lsast_engines.bundle.style import StyleFile

    if picture is not None and sheet is None:
        raise click.UsageError("found IN without --sheet; expected: lsast styles IN --sheet OUT")
    found: list[str] = []
    scales: dict[str, float] = {}
    for name, path in Bundle.open(find_bundle(bundle)).styles().items():
        try:
            scale = StyleFile(path).distilled_guidance
        except StyleError as error:  # one damaged style does not hide the others
            echo(f"{error}", err=True)
        else:
            found.append(name)
            scales |= {name: scale} if scale else {}
    if sheet is None:
        print_result({"styles": found, "guidance_baked": scales}, *found)
        return
    from ..images.sample import SAMPLE, THUMBNAIL

    context = click.get_current_context()
    run = main.get_command(context, "run")
    assert run is not None
    axes = (f"style={','.join(found)}",)
    context.invoke(run, paths=(str(picture or SAMPLE),), out=sheet, axes=axes, bundle=bundle, **THUMBNAIL)


@main.command("cache", cls=Command)
@click.argument("action", type=click.Choice(("list", "prune", "clear")), default="list")
@json_option
@debug_option
def cache(action: str) -> None:
    """List what is cached, or remove it.

    prune removes what was made of bundles that are gone or have changed, clear everything. All of it is made again when
    it is needed; bundles and styles are never touched.

    \b
      lsast cache
      lsast cache prune
    """
    from .cache import as_lines, cache_entries, remove

    with log_to_stderr(logging.WARNING):
        if action != "list":
            remove([entry for entry in cache_entries() if action == "clear" or not entry.used])
        entries = cache_entries()
    print_result({"entries": [asdict(entry) | {"path": str(entry.path)} for entry in entries]}, *as_lines(entries))


@main.command("doctor", cls=Command)
@json_option
@debug_option
def doctor() -> None:
    """Print what works on this machine and what to install.

    \b
      lsast doctor
      lsast doctor --json
    """
    from .doctor import examine

    with log_to_stderr(logging.WARNING):
        found = examine()
    print_result(asdict(found) | {"healthy": found.healthy}, *found.lines())
    if not found.healthy:
        raise click.exceptions.Exit(1)
