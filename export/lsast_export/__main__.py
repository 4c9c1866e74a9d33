"""`lsast-export`: bake a style, export a base, check a bundle.

The result's path, or with `--json` one JSON object, goes to stdout; phases and errors go to stderr. Exit status: 0
done, 1 failed, 2 wrong usage, 130 interrupted. torch and onnx are imported only when there is something to do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from lsast_engines.errors import LsastError, MissingExtraError, UsageError

Command = TypeVar("Command", bound=Callable[..., Any])

_DEFAULT_TYPES: dict[str, Callable[[str], Any]] = {
    "style": str,
    "steps": int,
    "strength": float,
    "guidance": float,
    "control": float,
    "solver": str,
    "size": int,
}
"""How the value of each of the manifest's defaults is read."""


class _Group(click.Group):
    """A group whose failures are one line a fault, with a traceback only on `--debug`."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            _fail(f"{error.format_message()} (--help lists all options)", UsageError.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _fail(f"{error.format_message()} (--help lists all options)", UsageError.exit_code)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.meta.get("lsast.debug"):
                traceback.print_exc()
            if isinstance(error, LsastError):
                _fail(str(error), error.exit_code)
            if isinstance(error, KeyboardInterrupt):
                _fail("interrupted", 130)
            _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    raise click.exceptions.Exit(status)


class _Phases:
    """Names each phase on stderr as it begins, and keeps how long each took."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._starts: list[tuple[str, float]] = []

    def __call__(self, phase: str) -> None:
        now = time.perf_counter() - self._began
        self._starts.append((phase, now))
        click.echo(f"[{now:6.1f} s] {phase}", err=True)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in order; the last one ends now."""
        ends = [start for _, start in self._starts[1:]] + [time.perf_counter() - self._began]
        return {phase: round(end - start, 3) for (phase, start), end in zip(self._starts, ends, strict=True)}


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["lsast.debug"] = True


def _common(command: Command) -> Command:
    """Options that every command has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the path."),
        click.option(
            "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show a traceback on errors."
        ),
    ):
        command = option(command)
    return command


def _exporting(command: Command) -> Command:
    """Options of commands that export a base."""
    for option in (
        click.option("--backend", metavar="NAME", help="Compare with torch on this backend. [default: onnxruntime]"),
        click.option(
            "--default",
            "defaults",
            multiple=True,
            metavar="KEY=VALUE",
            help=f"What lsast-run does unless told otherwise; again for others. KEY: {', '.join(_DEFAULT_TYPES)}.",
        ),
        click.option(
            "--precision", type=click.Choice(["fp32", "fp16"]), help="Storage of the weights. [default: fp16]"
        ),
        click.option("--base", metavar="PATH", help="Folder or name of the base or bundle. [default: embedded]"),
        click.option(
            "--style",
            "styles",
            multiple=True,
            metavar="NAME|FILE",
            help="A learned style: runs/NAME/NAME.prompts.safetensors, or the file; again for others.",
        ),
    ):
        command = option(command)
    return command


@click.group(
    "lsast-export",
    cls=_Group,
    invoke_without_command=True,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
@_exporting
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Write a whole bundle here.")
@_common
@click.pass_context
def main(
    ctx: click.Context,
    styles: tuple[str, ...],
    base: str | None,
    out: Path | None,
    precision: str | None,
    defaults: tuple[str, ...],
    backend: str | None,
    as_json: bool,
) -> None:
    """Bake the styles that lsast-train learned, for lsast-run to paint with.

    Without --out a style is baked for the bundle of its base and put into your style folder. With --out its base is
    exported too, into a bundle of its own; one that is there is replaced, its other styles are kept.
    """
    given = any((styles, base, out, precision, defaults, backend))
    if ctx.invoked_subcommand is not None:
        if given:
            raise UsageError(f"found options before {ctx.invoked_subcommand!r}; expected them behind it")
        ctx.meta["lsast.json"] = as_json
        return
    if not styles:
        raise UsageError("found nothing to do; expected --style NAME, or one of the commands bundle and check (--help)")
    if out is not None:
        _export(styles, base, out, precision, defaults, backend, as_json)
        return
    if precision or defaults or backend:
        raise UsageError("--precision, --default and --backend are of a whole bundle; expected --out DIR with them")
    _bake(styles, base, as_json)


@main.command()
@_exporting
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write."
)
@_common
@click.pass_context
def bundle(ctx: click.Context, /, **options: Any) -> None:
    """Export a base into a bundle, with or without styles."""
    _export(**{**options, "as_json": options["as_json"] or ctx.meta["lsast.json"]})


@main.command()
@click.argument("bundle", metavar="BUNDLE")
@click.option("--backend", default="auto", metavar="NAME", help="onnxruntime, openvino or auto. [default: auto]")
@click.option("--device", default="auto", metavar="NAME", help="cpu, cuda ... [default: auto]")
@_common
@click.pass_context
def check(ctx: click.Context, bundle: str, backend: str, device: str, as_json: bool) -> None:
    """Verify BUNDLE (a folder or a name): hashes, graphs, styles, and parity with torch on this machine."""
    _require_extra()
    from lsast_engines.bundle import find_bundle

    from .check import check_bundle

    phases = _Phases()
    report = check_bundle(find_bundle(bundle), backend, device, progress=phases)
    for name, error in report.figures.items():
        recorded = report.recorded.get(name)
        at_export = "" if recorded is None else f" (at export {recorded:.1e})"
        verdict = "" if error <= report.tolerance else f": past the tolerance of {report.tolerance:.0e}"
        click.echo(f"           {name}: relative error {error:.1e}{at_export}{verdict}", err=True)
    facts = {
        "bundle": str(report.bundle),
        "passed": report.passed,
        "backend": report.backend,
        "parity": report.figures,
        "recorded": report.recorded,
        "tolerance": report.tolerance,
        "styles": list(report.styles),
        "seconds": phases.seconds(),
    }
    click.echo(json.dumps(facts) if as_json or ctx.meta["lsast.json"] else report.bundle)
    if not report.passed:
        _fail(f"{report.bundle} does not compute what torch computes here; export it again, or use another backend", 1)


def _bake(styles: tuple[str, ...], base: str | None, as_json: bool) -> None:
    """Bake `styles` for the bundle of `base`, into the user's style folder."""
    _require_extra()
    from lsast_engines.bundle import MANIFEST, Bundle
    from lsast_train.base import find_base, load_base

    from .styles import install_style, read_prompts

    phases = _Phases()
    phases("reading")
    prompts = read_prompts(styles)
    folder = find_base(base)
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is a base that was not exported yet; expected --out DIR for its bundle")
    opened = Bundle.open(folder)
    loaded = load_base(folder)
    phases("baking")
    paths = {style.name: str(install_style(opened, loaded, style)) for style in prompts}
    facts = {"bundle": str(folder), "fingerprint": opened.manifest.fingerprint, "styles": paths}
    click.echo(json.dumps({**facts, "seconds": phases.seconds()}) if as_json else "\n".join(paths.values()))


def _export(
    styles: tuple[str, ...],
    base: str | None,
    out: Path,
    precision: str | None,
    defaults: tuple[str, ...],
    backend: str | None,
    as_json: bool,
) -> None:
    """Export `base` with `styles` to `out`."""
    wanted = _read_defaults(defaults)
    _require_extra()
    from lsast_engines.bundle import MANIFEST
    from lsast_engines.manifest import Manifest
    from lsast_train.base import find_base, load_base

    from .exporter import ExportOptions, export_bundle
    from .styles import read_prompts

    phases = _Phases()
    phases("reading")
    prompts = read_prompts(styles)
    folder = find_base(base)
    inherited: dict[str, Any] = {}
    if (folder / MANIFEST).is_file():
        inherited = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"), str(folder / MANIFEST)).defaults
    if prompts:
        inherited = {key: value for key, value in inherited.items() if key != "style"}
    chosen: dict[str, Any] = {"precision": precision, "backend": backend}
    options = dataclasses.replace(ExportOptions(), **{key: value for key, value in chosen.items() if value is not None})
    written = export_bundle(load_base(folder), out, prompts, options, {**inherited, **wanted}, progress=phases)
    manifest = written.manifest
    facts = {
        "bundle": str(written.path),
        "fingerprint": manifest.fingerprint,
        "precision": manifest.precision,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "parity": manifest.parity,
        "styles": {name: str(path) for name, path in written.styles().items()},
        "seconds": phases.seconds(),
    }
    click.echo(json.dumps(facts) if as_json else written.path)


def _read_defaults(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs as values of the right types; all faults at once."""
    values: dict[str, Any] = {}
    faults = []
    for pair in pairs:
        key, separator, text = pair.partition("=")
        try:
            values[key] = _DEFAULT_TYPES[key](text)
        except KeyError:
            faults.append(f"{pair}: found key {key!r}; expected one of {', '.join(_DEFAULT_TYPES)}")
        except ValueError:
            faults.append(f"{pair}: found {text!r}; expected a {'whole ' * (_DEFAULT_TYPES[key] is int)}number")
        if not separator:
            faults.append(f"{pair}: expected KEY=VALUE")
    if faults:
        from lsast_engines.errors import fault_list

        raise UsageError(fault_list("these defaults cannot be meant:", faults))
    return values


def _require_extra() -> None:
    """Make sure that the libraries of the extra are there before anything heavy is imported."""
    for library in ("torch", "diffusers", "onnx", "onnxscript"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, "export")


if __name__ == "__main__":
    main()
