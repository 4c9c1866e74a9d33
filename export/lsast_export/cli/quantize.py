"""`lsast-export quantise`: a bundle in 8 bits from an exported one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import click

from lsast_engines.errors import MissingExtraError

from .console import Phases, common


def _refuse(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Say what to do instead of a precision that was removed."""
    if value not in (None, "int8"):
        raise click.UsageError(
            f"found --precision {value}; expected int8, the only one since int8-weights was removed: for less memory "
            "export in fp16"
        )


@click.command("quantise")
@click.argument("bundle", metavar="BUNDLE", required=False)
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write."
)
@click.option("--precision", hidden=True, expose_value=False, callback=_refuse)
@click.option(
    "--images",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Pictures to calibrate on and to judge by, such as will be painted. [default: some are drawn]",
)
@click.option("--pictures", type=int, metavar="N", help="Calibrate on N of them, judge by N others. [default: 4]")
@click.option("--size", type=int, metavar="PIXELS", help="Side that they are painted at. [default: 256]")
@click.option(
    "--target",
    type=float,
    metavar="DB",
    help="Least mean PSNR to paintings by the float graphs; below it nothing is written. [default: 30]",
)
@click.option("--backend", metavar="NAME", help="Judge on onnxruntime or openvino. [default: onnxruntime]")
@click.option(
    "--smooth",
    type=float,
    metavar="ALPHA",
    help="How much of what is hard to round moves into weights, 0 to 1 (SmoothQuant). [default: 0.7]",
)
@click.option(
    "--also",
    multiple=True,
    type=click.Choice(["encoder", "decoder"]),
    help="Quantise this, too. It runs once a picture, and what it rounds shows at once.",
)
@click.option("--no-smooth", is_flag=True, help="Move nothing.")
@common
@click.pass_context
def quantise_command(
    ctx: click.Context,
    /,
    bundle: str | None,
    out: Path,
    as_json: bool,
    no_smooth: bool,
    also: tuple[str, ...],
    **chosen: Any,
) -> None:
    """Write BUNDLE (a folder or a name; the embedded one) in 8 bits, for processors, with its styles.

    Paintings under its styles give the ranges that activations take; paintings of other pictures are the proof.
    """
    if chosen["smooth"] is not None and no_smooth:
        raise click.UsageError("found --smooth and --no-smooth; expected one of them")
    for library in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, {"onnx": "export", "onnxruntime": "cpu"}[library])
    from lsast_engines.bundle.bundle import Bundle, find_bundle
    from lsast_engines.environment import peak_memory

    from ..quantize.quantize import QuantiseOptions, quantise_bundle

    phases = Phases()
    phases("reading")
    source = Bundle.open(find_bundle(bundle))
    given = {name: value for name, value in chosen.items() if value is not None}
    if no_smooth:
        given["smooth"] = None
    given["also"] = frozenset(also)
    written = quantise_bundle(source, out, dataclasses.replace(QuantiseOptions(), **given), phases)
    manifest = written.manifest
    for name, figure in manifest.parity.items():
        click.echo(f"           {name}: {figure:.1f}", err=True)
    facts = {
        "bundle": str(written.path),
        "storage_dtype": manifest.storage_dtype,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "parity": manifest.parity,
        "source": manifest.source,
        "seconds": phases.seconds(),
        "peak_rss_bytes": peak_memory(),
    }
    click.echo(json.dumps(facts) if as_json or ctx.meta.get("lsast.json") else written.path)
