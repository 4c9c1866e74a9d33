"""`lsast-export`: bake a style, export a base, check a bundle.

The result's path, or with `--json` one JSON object, goes to stdout; phases and errors go to stderr. Exit status: 0
done, 1 failed, 2 wrong usage, 130 interrupted. torch and onnx are imported only when there is something to do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lsast_engines.bundle.style import STYLE_DEFAULTS
from lsast_engines.cli import Group, fail
from lsast_engines.errors import UsageError

from .cli.compile import LIBRARIES, compile_command, compiled
from .cli.console import Command, Phases, common, require_extra
from .cli.decoder import decoder_command
from .cli.golden import golden_command
from .cli.import_ import import_command
from .cli.parts import parts_command
from .cli.quantize import quantise_command

_DEFAULT_TYPES: dict[str, Callable[[str], Any]] = {
    "style": str,
    **STYLE_DEFAULTS,
    "size": int,
}
"""How the value of each of the manifest's defaults is read."""


def _exporting(command: Command) -> Command:
    """Options of commands that export a base."""
    for option in (
        click.option(
            "--sm",
            multiple=True,
            metavar="N.N",
            help="With --backend tensorrt-rtx, compute capability to compile for, e.g. 8.6,8.9. [default: portable]",
        ),
        click.option(
            "--backend",
            metavar="NAME",
            help="Compare with torch on this backend [default: onnxruntime]; tensorrt, tensorrt-rtx: compile engines.",
        ),
        click.option(
            "--default",
            "defaults",
            multiple=True,
            metavar="[STYLE.]KEY=VALUE",
            help=f"What lsast-run does unless told otherwise, with STYLE. for one style only; again for others. "
            f"KEY: {', '.join(_DEFAULT_TYPES)}.",
        ),
        click.option(
            "--storage-dtype",
            "--precision",
            "storage_dtype",
            type=click.Choice(["fp32", "fp16", "bf16"]),
            help="Storage of the weights. [default: fp16]",
        ),
        click.option(
            "--parts", is_flag=True, help="Write the denoiser's parts too, see lsast-export parts; kept if there."
        ),
        click.option("--revision", metavar="REV", help="Commit hash or tag of a base from the hub."),
        click.option(
            "--unet-weights",
            type=click.Choice(["auto", "ema", "non-ema"]),
            help="Weights of a base that holds two sets. [default: auto, the averaged ones (EMA) if there]",
        ),
        click.option(
            "--controlnet", metavar="PATH", help="ControlNet of a base to import: a folder, a file, or OWNER/NAME."
        ),
        click.option(
            "--base",
            metavar="PATH",
            help="Folder or name of the base or bundle; to import one, a folder in diffusers' format, a file in "
            "CompVis naming, or OWNER/NAME of the hub. [default: embedded]",
        ),
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
    cls=Group,
    invoke_without_command=True,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
@_exporting
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Write a whole bundle here.")
@common
@click.pass_context
def main(
    ctx: click.Context,
    styles: tuple[str, ...],
    base: str | None,
    controlnet: str | None,
    unet_weights: str | None,
    revision: str | None,
    out: Path | None,
    storage_dtype: str | None,
    defaults: tuple[str, ...],
    backend: str | None,
    sm: tuple[str, ...],
    parts: bool,
    as_json: bool,
) -> None:
    """Bake the styles that lsast-train learned, for lsast-run to paint with.

    Without --out a style is baked for the bundle of its base and put into your style folder. With --out its base is
    exported too, into a bundle of its own; one that is there is replaced, its other styles are kept.
    """
    imports = {"controlnet": controlnet, "unet_weights": unet_weights, "revision": revision}
    given = any((styles, base, out, storage_dtype, defaults, backend, sm, parts, *imports.values()))
    if ctx.invoked_subcommand is not None:
        if given:
            raise UsageError(f"found options before {ctx.invoked_subcommand!r}; expected them behind it")
        ctx.meta["lsast.json"] = as_json
        return
    if not styles:
        raise UsageError(
            "found nothing to do; expected --style NAME, or one of the commands bundle, check, compile, golden, "
            "decoder, import, parts, quantise (--help)"
        )
    if out is not None:
        _export(styles, base, out, storage_dtype, defaults, backend, sm, parts, as_json, **imports)
        return
    library, backend = _library(backend, sm)
    wanted, own = _read_defaults(defaults)
    if storage_dtype or wanted or backend or parts or any(imports.values()):
        raise UsageError(
            "--storage-dtype, --default KEY=VALUE, --backend, --parts, --controlnet, --unet-weights and --revision are "
            "of a whole bundle; expected --out DIR with them (a style's own: --default STYLE.KEY=VALUE)"
        )
    _bake(styles, base, own, library, sm, as_json)


@main.command()
@_exporting
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write."
)
@common
@click.pass_context
def bundle(ctx: click.Context, /, **options: Any) -> None:
    """Export a base into a bundle, with or without styles."""
    _export(**{**options, "as_json": options["as_json"] or ctx.meta["lsast.json"]})


@main.command()
@click.argument("bundle", metavar="BUNDLE")
@click.option("--backend", default="auto", metavar="NAME", help="onnxruntime, openvino or auto. [default: auto]")
@click.option("--device", default="auto", metavar="NAME", help="cpu, cuda ... [default: auto]")
@common
@click.pass_context
def check(ctx: click.Context, bundle: str, backend: str, device: str, as_json: bool) -> None:
    """Verify BUNDLE (a folder or a name): hashes, graphs, styles, and parity with torch on this machine."""
    _require_extra()
    from lsast_engines.bundle.bundle import find_bundle

    from .bundle.check import check_bundle

    phases = Phases()
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
        fail(f"{report.bundle} does not compute what torch computes here; export it again, or use another backend", 1)


def _library(backend: str | None, sm: tuple[str, ...]) -> tuple[str | None, str | None]:
    """What compiles engines, and what the graphs are compared with torch on: `--backend` names either."""
    if backend in LIBRARIES:
        return backend, None
    if sm:
        raise UsageError(f"found --sm {','.join(sm)}; expected --backend tensorrt-rtx with it")
    return None, backend


def _bake(
    styles: tuple[str, ...],
    base: str | None,
    defaults: dict[str, dict[str, Any]],
    library: str | None,
    sm: tuple[str, ...],
    as_json: bool,
) -> None:
    """Bake `styles` for the bundle of `base`, into the user's style folder, and compile it with `library`."""
    _require_extra()
    from lsast_engines.bundle.bundle import MANIFEST, Bundle
    from lsast_train.base.base import find_base, open_base_parts

    from .graphs.meta_base import baking_base
    from .styles.install import find_distilled, install_distilled, install_style, read_prompts, with_defaults

    phases = Phases()
    phases("reading")
    distilled = {name: path for name in styles if (path := find_distilled(name)) is not None}
    prompts = with_defaults(read_prompts(tuple(name for name in styles if name not in distilled)), defaults)
    folder = find_base(base)
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is a base that was not exported yet; expected --out DIR for its bundle")
    opened = Bundle.open(folder)
    loaded = baking_base(open_base_parts(folder))
    phases("baking")
    installed = [install_style(opened, loaded, style) for style in prompts]
    installed += [install_distilled(opened, path) for path in distilled.values()]
    paths = {path.stem: str(path) for path in installed}
    facts: dict[str, Any] = {"bundle": str(folder), "fingerprint": opened.manifest.fingerprint, "styles": paths}
    if library is not None:
        facts["compiled"] = compiled(folder, library, phases, sm=sm)
    click.echo(json.dumps({**facts, "seconds": phases.seconds()}) if as_json else "\n".join(paths.values()))


def _export(
    styles: tuple[str, ...],
    base: str | None,
    out: Path,
    storage_dtype: str | None,
    defaults: tuple[str, ...],
    backend: str | None,
    sm: tuple[str, ...],
    parts: bool,
    as_json: bool,
    **imports: str | None,
) -> None:
    """Export `base` with `styles` to `out`; `imports` are the fields of `BaseSource` beside the base."""
    wanted, own = _read_defaults(defaults)
    library, backend = _library(backend, sm)
    _require_extra()
    from lsast_engines.bundle.bundle import MANIFEST
    from lsast_engines.bundle.graph_spec import UNET_SPLIT_GRAPHS, VAE_DECODER_TINY
    from lsast_engines.bundle.manifest import Manifest
    from lsast_engines.environment import peak_memory
    from lsast_train.base.base import open_base_parts, stored_base
    from lsast_train.checkpoints.source import BaseSource

    from .bundle.export import ExportOptions, export_bundle
    from .graphs.meta_base import text_base
    from .graphs.small_decoder import WEIGHTS as SMALL_WEIGHTS
    from .graphs.small_decoder import add_small_decoder, read_small_decoder
    from .styles.install import read_prompts, with_defaults

    phases = Phases()
    phases("reading")
    fields: dict[str, Any] = {name: value for name, value in imports.items() if value is not None}
    source = BaseSource(base, **fields)
    folder = stored_base(source)
    networks = open_base_parts(source)
    prompts = with_defaults(read_prompts(styles, text_base(networks) if styles else None), own)
    inherited: dict[str, Any] = {}
    small = None
    if folder is not None and (folder / MANIFEST).is_file():
        before = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"), str(folder / MANIFEST))
        inherited = before.defaults
        parts |= before.graphs.keys() >= set(UNET_SPLIT_GRAPHS)
        if VAE_DECODER_TINY in before.graphs:
            small = read_small_decoder(folder / SMALL_WEIGHTS, before)
    if prompts:
        inherited = {key: value for key, value in inherited.items() if key != "style"}
    chosen: dict[str, Any] = {"storage_dtype": storage_dtype, "backend": backend}
    options = dataclasses.replace(
        ExportOptions(parts=parts), **{key: value for key, value in chosen.items() if value is not None}
    )
    written = export_bundle(networks, out, prompts, options, {**inherited, **wanted}, progress=phases)
    if small is not None:
        written = add_small_decoder(out, small, options.backend, phases)
    engines = {} if library is None else {"compiled": compiled(written.path, library, phases, sm=sm)}
    manifest, peak = written.manifest, peak_memory()
    facts = {
        **engines,
        "bundle": str(written.path),
        "fingerprint": manifest.fingerprint,
        "storage_dtype": manifest.storage_dtype,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "parity": manifest.parity,
        "styles": {name: str(path) for name, path in written.styles().items()},
        "seconds": phases.seconds(),
        "peak_rss_bytes": peak,
    }
    if peak is not None:
        click.echo(f"           peak memory {peak / 1e9:.2f} GB", err=True)
    click.echo(json.dumps(facts) if as_json else written.path)


def _read_defaults(pairs: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """``KEY=VALUE`` pairs as values of the right types, and ``STYLE.KEY=VALUE`` pairs by style; all faults at once."""
    values: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    faults = []
    for pair in pairs:
        name, separator, text = pair.partition("=")
        style, _, key = name.rpartition(".")
        try:
            (own.setdefault(style, {}) if style else values)[key] = _DEFAULT_TYPES[key](text)
        except KeyError:
            faults.append(f"{pair}: found key {key!r}; expected one of {', '.join(_DEFAULT_TYPES)}")
        except ValueError:
            faults.append(f"{pair}: found {text!r}; expected a {'whole ' * (_DEFAULT_TYPES[key] is int)}number")
        if not separator:
            faults.append(f"{pair}: expected KEY=VALUE")
    if faults:
        from lsast_engines.errors import fault_list

        raise UsageError(fault_list("these defaults cannot be meant:", faults))
    return values, own


def _require_extra() -> None:
    require_extra("torch", "diffusers", "onnx", "onnxscript")


main.add_command(compile_command)
main.add_command(golden_command)
main.add_command(import_command)
main.add_command(quantise_command)
main.add_command(parts_command)
main.add_command(decoder_command)

if __name__ == "__main__":
    main()
