"""`lsast-export quantize`: make a bundle in int8 from an exported one."""

import logging
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lsast_engines.cli import Command, debug_option, json_option, log_to_stderr, print_result
from lsast_engines.environment import peak_memory, require_extra
from lsast_train.cli.shared import declared_options, folder_option

from ..progress import PhaseTimer
from ..quantize.options import QuantizeOptions

_OPTIONAL = {name: f"vae_{name.removeprefix('vae_')}" for name in ("vae_encoder", "vae_decoder", "encoder", "decoder")}
"""Graphs that `--also` takes, with their old names."""


def _refuse(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Say what to do instead of a storage type that was removed."""
    if value not in (None, "int8"):
        raise click.UsageError(
            f"found --storage-dtype {value}; expected int8, the only one since int8-weights was removed: for less "
            "memory export in fp16"
        )


@click.command("quantize", cls=Command, requires=("export", "onnx"))
@click.argument("bundle", metavar="[BUNDLE]", required=False)
@folder_option("-o", "--out", text="Folder of the bundle to write.", required=True)
@click.option("--storage-dtype", hidden=True, expose_value=False, callback=_refuse)
@folder_option(
    "--images",
    text="Pictures to calibrate and to evaluate on, like those that will be repainted. [default: some are drawn]",
)
@declared_options(QuantizeOptions)
@click.option(
    "--also",
    multiple=True,
    type=click.Choice(list(_OPTIONAL)),
    metavar="GRAPH",
    help="Quantize this graph, too: vae_encoder or vae_decoder. It runs once a picture, and its errors are visible.",
)
@click.option("--no-smooth", is_flag=True, help="Do without SmoothQuant.")
@json_option
@debug_option
def quantize_command(
    bundle: str | None, out: Path, images: Path | None, no_smooth: bool, also: tuple[str, ...], **chosen: Any
) -> None:
    """Write BUNDLE (a folder or a name; the embedded one) in int8, for CPUs, with its styles.

    The ranges of activations are taken from runs on calibration pictures; pictures that were not calibrated on are
    repainted in int8 and in float, and compared.
    """
    given = click.get_current_context().get_parameter_source("smooth")
    if no_smooth and given is not ParameterSource.DEFAULT:
        raise click.UsageError("found --smooth and --no-smooth; expected one of them")
    click.get_current_context().with_resource(log_to_stderr(logging.WARNING))
    require_extra("cpu", "onnxruntime")
    from lsast_engines.bundle.bundle import Bundle, find_bundle

    from ..quantize.quantize import quantize_bundle

    phases = PhaseTimer()
    phases("reading")
    source = Bundle.open(find_bundle(bundle))
    if no_smooth:
        chosen["smooth"] = None
    options = QuantizeOptions(images, also=frozenset(_OPTIONAL[name] for name in also), **chosen)
    written = quantize_bundle(source, out, options, phases)
    manifest = written.manifest
    for name, figure in manifest.parity.items():
        phases.figure(f"{name}: {figure:.1f}")
    facts = {
        "bundle": str(written.path),
        "storage_dtype": manifest.storage_dtype,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "parity": manifest.parity,
        "source": manifest.source,
        "seconds": phases.seconds(),
        "peak_rss_bytes": peak_memory(),
    }
    print_result(facts, written.path)
