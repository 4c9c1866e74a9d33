"""The commands `bundle`, `decoder` and `check`: export a base, add a small decoder to a bundle, verify one."""

import logging
from pathlib import Path
from typing import Any

import click

from lsast_engines.bundle.graph_spec import VAE_DECODER_TINY
from lsast_engines.bundle.style import BUNDLE_DEFAULTS, STYLE_DEFAULTS, parse_defaults
from lsast_engines.cli import (
    Command,
    OptionDecorator,
    combine_options,
    debug_option,
    fail,
    json_option,
    log_to_stderr,
    print_result,
)
from lsast_engines.errors import UsageError
from lsast_train.cli.shared import folder_option, import_options

from ..progress import PhaseTimer

EXTRA = ("export", "torch", "diffusers", "onnx", "onnxscript")
"""The extra that most commands require, and libraries of it."""

style_options = combine_options(
    click.option(
        "--default",
        "defaults",
        multiple=True,
        metavar="[STYLE.]KEY=VALUE",
        help="A default option of one style; without STYLE, of the bundle that is exported. May be repeated. "
        f"KEY: {', '.join(BUNDLE_DEFAULTS)}; of a style also {', '.join(STYLE_DEFAULTS.keys() - BUNDLE_DEFAULTS)}.",
    ),
    click.option(
        "--base",
        metavar="PATH",
        help="Folder or name of the base or bundle. `bundle` also imports one: a folder in diffusers' format, a "
        "file in CompVis naming, or OWNER/NAME of the hub. [default: embedded]",
    ),
    click.option(
        "-s",
        "--style",
        "styles",
        multiple=True,
        metavar="NAME|FILE",
        help="A learned style to bake: runs/NAME/NAME.prompts.safetensors, or the file. May be repeated.",
    ),
)
"""Adds the options that say which styles to bake, and on which base."""


def bundle_options(hidden: bool = False) -> OptionDecorator:
    """Adds the options of an export; hidden ones are the old spelling of the command, `lsast-export … --out DIR`."""
    return combine_options(
        click.option(
            "--backend",
            metavar="NAME",
            help="tensorrt-rtx or tensorrt: compile the engines that the styles' bundle lacks, too."
            if hidden
            else "Backend to compare with torch on. [default: onnxruntime]",
        ),
        click.option(
            "--storage-dtype",
            type=click.Choice(["fp32", "fp16", "bf16"]),
            hidden=hidden,
            help="Data type (dtype) that weights are stored in. [default: fp16]",
        ),
        import_options(hidden),
        folder_option(
            *("-o", "--out"),
            text="Folder of the bundle to write. A bundle there is replaced, its other styles are kept.",
            required=not hidden,
            hidden=hidden,
        ),
    )


@click.command("bundle", cls=Command, requires=EXTRA)
@style_options
@bundle_options()
@json_option
@debug_option
def bundle_command(**options: Any) -> None:
    """Export a base into a bundle, with or without styles: graphs, compared with torch, and weights.

    \b
      lsast-export bundle --base sd15 --out engines/sd15
      lsast-export bundle --base photos.safetensors --style mine --out engines/photos
    """
    export(**options)


def export(
    styles: tuple[str, ...],
    base: str | None,
    defaults: tuple[str, ...],
    out: Path,
    storage_dtype: str | None,
    backend: str | None,
    **imports: str | None,
) -> None:
    """Export `base` with `styles` to `out` and print where; `imports` are the other fields of `BaseSource`."""
    click.get_current_context().with_resource(log_to_stderr(logging.WARNING))
    if backend is not None and backend.startswith("tensorrt"):
        raise UsageError(
            f"found --backend {backend}; expected onnxruntime or openvino, to compare with torch on: engines are "
            f"compiled by lsast-export compile {out} --backend {backend}"
        )
    wanted, for_styles = parse_defaults(defaults)
    from lsast.options.style_mix import Mix
    from lsast_engines.bundle.bundle import STYLES
    from lsast_engines.environment import peak_memory
    from lsast_train.base.lazy_base import open_base, resolve_local_base
    from lsast_train.checkpoints.source import BaseSource

    from ..bundle.add_decoder import add_small_decoder
    from ..bundle.export import ExportOptions, export_bundle, inherited_from
    from ..styles.bake import read_prompts, with_defaults

    phases = PhaseTimer()
    phases("reading")
    fields: dict[str, Any] = {name: value for name, value in imports.items() if value is not None}
    source = BaseSource(base, **fields)
    networks = open_base(source)
    folder = resolve_local_base(source)
    before, small, inherited = inherited_from(folder)
    chosen_styles = read_prompts(styles, folder)
    names = {style.name for style in chosen_styles}
    prompts = with_defaults([*chosen_styles, *(style for style in inherited if style.name not in names)], for_styles)
    there = {*(style.name for style in prompts), *(file.stem for file in (out / STYLES).glob("*.safetensors"))}
    kept = {
        key: value
        for key, value in before.items()
        if key != "style" or (not names and {term.style for term in Mix.parse(value).terms} <= there)
    }
    chosen: dict[str, Any] = {"storage_dtype": storage_dtype, "backend": backend}
    options = ExportOptions(**{key: value for key, value in chosen.items() if value is not None})
    written = export_bundle(networks, out, prompts, options, {**kept, **wanted}, progress=phases)
    if small is not None:
        written = add_small_decoder(out, small, options.backend, phases)
    manifest, peak = written.manifest, peak_memory()
    facts = {
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
        phases.figure(f"peak memory {peak / 1e9:.2f} GB")
    print_result(facts, written.path)


@click.command("decoder", cls=Command, requires=EXTRA)
@click.argument("bundle", metavar="BUNDLE")
@click.option(
    "--small",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Folder of a diffusers AutoencoderTiny, such as TAESD's, or its .safetensors alone.",
)
@click.option(
    "--backend", default="onnxruntime", show_default=True, metavar="NAME", help="Backend to compare with torch on."
)
@json_option
@debug_option
def decoder_command(bundle: str, small: Path, backend: str) -> None:
    """Add the decoder of a tiny autoencoder to BUNDLE (a folder or a name), for `lsast-run --decoder small`.

    It must have been made for the latents of that base: TAESD's is for those of Stable Diffusion 1.x. It is compared
    with torch; weights, the other graphs and styles of the bundle stay as they are.
    """
    click.get_current_context().with_resource(log_to_stderr(logging.WARNING))
    from lsast_engines.bundle.bundle import Bundle, find_bundle

    from ..bundle.add_decoder import add_small_decoder
    from ..graphs.small_decoder import WEIGHTS, read_small_decoder

    phases = PhaseTimer()
    folder = find_bundle(bundle)
    phases("reading the decoder")
    decoder = read_small_decoder(small, Bundle.open(folder, verify_hashes=False).manifest)
    written = add_small_decoder(folder, decoder, backend, progress=phases)
    manifest = written.manifest
    facts = {
        "bundle": str(written.path),
        "bytes": sum(manifest.files[name].bytes for name in (f"{VAE_DECODER_TINY}.onnx", WEIGHTS)),
        "parity": {VAE_DECODER_TINY: manifest.parity[VAE_DECODER_TINY]},
        "seconds": phases.seconds(),
    }
    print_result(facts, written.path)


@click.command("check", cls=Command, requires=EXTRA)
@click.argument("bundle", metavar="BUNDLE")
@click.option("--backend", default="auto", metavar="NAME", help="onnxruntime, openvino or auto. [default: auto]")
@click.option("--device", default="auto", metavar="NAME", help="cpu, cuda ... [default: auto]")
@json_option
@debug_option
def check_command(bundle: str, backend: str, device: str) -> None:
    """Verify BUNDLE (a folder or a name): hashes, graphs, styles, and parity with torch on this machine."""
    click.get_current_context().with_resource(log_to_stderr(logging.WARNING))
    from lsast_engines.bundle.bundle import find_bundle

    from ..bundle.check import check_bundle

    phases = PhaseTimer()
    report = check_bundle(find_bundle(bundle), backend, device, progress=phases)
    for name, error in report.figures.items():
        recorded = report.recorded.get(name)
        at_export = "" if recorded is None else f" (at export {recorded:.1e})"
        verdict = "" if error <= report.tolerance else f": past the tolerance of {report.tolerance:.0e}"
        phases.figure(f"{name}: relative error {error:.1e}{at_export}{verdict}")
    auto = {}
    if report.auto is not None:
        auto = {"backend": report.auto.backend, "compute_dtype": report.auto.compute_dtype, "psnr": report.auto_psnr}
        phases.figure(
            f"auto: {report.auto.backend} in {report.auto.compute_dtype}, {report.auto_psnr:.1f} dB to fp32 "
            f"(expected {report.auto_expected:.3g})"
        )
    facts = {
        "bundle": str(report.bundle),
        "passed": report.passed,
        "backend": report.backend,
        "parity": report.figures,
        "auto": auto,
        "recorded": report.recorded,
        "tolerance": report.tolerance,
        "styles": list(report.styles),
        "seconds": phases.seconds(),
    }
    print_result(facts, report.bundle)
    if report.faults:
        fail(f"{report.bundle} {', and '.join(report.faults)}", 1)
