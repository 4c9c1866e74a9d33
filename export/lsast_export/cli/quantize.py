"""`lsast-export quantize`: make a bundle in int8 from an exported one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Command, debug_option, json_option, print_result
from lsast_engines.environment import require_extra

from ..progress import PhaseTimer

_OPTIONAL = {
    "vae_encoder": "vae_encoder",
    "vae_decoder": "vae_decoder",
    "encoder": "vae_encoder",
    "decoder": "vae_decoder",
}
"""Graphs that `--also` takes, with their old names."""


def _refuse(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Say what to do instead of a storage type that was removed."""
    if value not in (None, "int8"):
        raise click.UsageError(
            f"found --storage-dtype {value}; expected int8, the only one since int8-weights was removed: for less "
            "memory export in fp16"
        )


@click.command("quantize", cls=Command, requires=("export", "onnx"))
@click.argument("bundle", metavar="BUNDLE", required=False)
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write."
)
@click.option("--storage-dtype", hidden=True, expose_value=False, callback=_refuse)
@click.option(
    "--images",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Pictures to calibrate and to evaluate on, like those that will be repainted. [default: some are drawn]",
)
@click.option("--pictures", type=int, metavar="N", help="Calibrate on N of them, evaluate on N others. [default: 4]")
@click.option("--size", type=int, metavar="PIXELS", help="Side of these pictures. [default: 256]")
@click.option(
    "--target",
    type=float,
    metavar="DB",
    help="Least mean PSNR to the pictures of the float graphs; below it nothing is written. [default: 30]",
)
@click.option(
    "--backend", metavar="NAME", help="Backend to evaluate on: onnxruntime or openvino. [default: onnxruntime]"
)
@click.option(
    "--smooth",
    type=float,
    metavar="ALPHA",
    help="SmoothQuant's migration strength, 0 to 1. [default: 0.7]",
)
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
    bundle: str | None, out: Path, no_smooth: bool, also: tuple[str, ...], smooth: float | None, **chosen: Any
) -> None:
    """Write BUNDLE (a folder or a name; the embedded one) in int8, for CPUs, with its styles.

    The ranges of activations are taken from runs on calibration pictures; pictures that were not calibrated on are
    repainted in int8 and in float, and compared.
    """
    if smooth is not None and no_smooth:
        raise click.UsageError("found --smooth and --no-smooth; expected one of them")
    require_extra("cpu", "onnxruntime")
    from lsast_engines.bundle.bundle import Bundle, find_bundle
    from lsast_engines.environment import peak_memory

    from ..quantize.quantize import QuantizeOptions, quantize_bundle

    phases = PhaseTimer()
    phases("reading")
    source = Bundle.open(find_bundle(bundle))
    given = {name: value for name, value in chosen.items() if value is not None}
    if smooth is not None or no_smooth:
        given["smooth"] = smooth
    options = dataclasses.replace(QuantizeOptions(also=frozenset(_OPTIONAL[name] for name in also)), **given)
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
