"""`lsast-export golden`: repeat what the released code computed, and compare."""

from __future__ import annotations

import math
from pathlib import Path

import click

from lsast_engines.cli import Command, debug_option, echo, json_option, print_result
from lsast_engines.errors import ParityError, fault_list

from .shared import EXTRA, PhaseTimer


def _tolerance(_: click.Context, __: click.Parameter, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"found {value}; expected more than 0")
    return value


@click.command("golden", cls=Command, requires=EXTRA)
@click.argument("prefix", metavar="PREFIX", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["torch", "onnxruntime", "openvino"]),
    default="torch",
    show_default=True,
    help="torch, or the backend that runs the exported graphs.",
)
@click.option(
    "--tolerance",
    type=float,
    default=1e-4,
    callback=_tolerance,
    metavar="ERROR",
    help="Largest relative error that passes. [default: 1e-4]",
)
@json_option
@debug_option
def golden_command(prefix: Path, backend: str, tolerance: float) -> None:
    """Compare with what LSAST's released code computed: PREFIX_unet, PREFIX_control and PREFIX_io (.safetensors).

    Prints a line for each quantity, its largest error relative to the largest value recorded: the start latent,
    ControlNet's residuals, both halves of every step's eps (from the recorded latents, and free-running), the final
    latent; with torch also loss and gradient of PREFIX_train, if there is one. Exit status 1 past the tolerance.
    """
    from ..parity.golden.compare import check_golden
    from ..parity.golden.golden_set import read_golden
    from ..parity.parity import past_tolerance

    report = check_golden(read_golden(prefix), backend, tolerance, PhaseTimer())
    for note in report.notes:
        echo(note, err=True)
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
    width = max(map(len, report.errors))
    lines = [
        f"{name:{width}}  {error:.2e}{'' if error <= tolerance else '  past the tolerance'}"
        for name, error in report.errors.items()
    ]
    print_result(facts, *lines)
    if not report.passed:
        heading = f"{prefix} is not reproduced on {backend}:"
        raise ParityError(fault_list(heading, past_tolerance(report.errors, tolerance)))
