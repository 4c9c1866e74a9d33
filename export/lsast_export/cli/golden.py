"""`lsast-export golden`: run what the released code computed, and compare."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import click

from lsast_engines.errors import MissingExtraError, ParityError, fault_list

from .console import common


def _tolerance(_: click.Context, __: click.Parameter, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"found {value}; expected more than 0")
    return value


@click.command("golden")
@click.argument("prefix", metavar="PREFIX", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["torch", "onnxruntime", "openvino"]),
    default="torch",
    help="torch, or where to run the exported graphs. [default: torch]",
)
@click.option(
    "--tolerance",
    type=float,
    default=1e-4,
    callback=_tolerance,
    metavar="ERROR",
    help="Largest relative error that passes. [default: 1e-4]",
)
@common
@click.pass_context
def golden_command(ctx: click.Context, prefix: Path, backend: str, tolerance: float, as_json: bool) -> None:
    """Compare with what LSAST's released code computed: PREFIX_unet, PREFIX_control and PREFIX_io (.safetensors).

    Prints a line for each quantity, its largest error relative to the largest value recorded: the start latent,
    ControlNet's residuals, both halves of every step's eps (from the recorded latents, and free-running), the final
    latent; with torch also loss and gradient of PREFIX_train, where it is there. Exit status 1 past the tolerance.
    """
    for library in ("torch", "diffusers", "onnx", "onnxscript"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, "export")
    from ..parity.golden.compare import check_golden, failures
    from ..parity.golden.reader import read_golden

    report = check_golden(read_golden(prefix), backend, tolerance, lambda phase: click.echo(phase, err=True))
    for note in report.notes:
        click.echo(note, err=True)
    if as_json or ctx.meta.get("lsast.json"):
        facts = {
            "prefix": str(report.prefix),
            "passed": report.passed,
            "backend": report.backend,
            "tolerance": report.tolerance,
            "errors": report.errors,
            "largest": max(report.errors.values()),
            "architecture": report.architecture,
            "notes": list(report.notes),
            "seconds": round(report.seconds, 3),
        }
        click.echo(json.dumps(facts))
    else:
        width = max(map(len, report.errors))
        for name, error in report.errors.items():
            click.echo(f"{name:{width}}  {error:.2e}{'' if error <= tolerance else '  past the tolerance'}")
    if not report.passed:
        heading = f"{prefix} is not reproduced on {backend}:"
        raise ParityError(fault_list(heading, failures(report.errors, tolerance)))
