"""`lsast-export compile`: compile a bundle's graphs into engines for NVIDIA GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from lsast_engines.backends.tensorrt.engine_record import Range, ShapeRanges, TrtFlavor
from lsast_engines.cli import Command, debug_option, json_option, print_result
from lsast_engines.errors import UsageError
from lsast_train.cli.shared import folder_option

from ..progress import PhaseTimer

if TYPE_CHECKING:
    from ..tensorrt.compile import CompileOptions


@click.command("compile", cls=Command, requires=("export", "onnx", "onnx_ir"))
@click.argument("bundle", metavar="[BUNDLE]", required=False)
@click.option("--backend", type=click.Choice(get_args(TrtFlavor)), required=True, help="The library that compiles.")
@folder_option("-o", "--out", text="Put engines here, not where lsast-run finds them.")
@click.option(
    "--graph",
    "graphs",
    metavar="NAME",
    multiple=True,
    help="Compile this graph only; may be repeated. [default: those of the preset exact]",
)
@click.option("--compute-dtype", metavar="TYPE", help="Data type (dtype) to compute in: fp16 or fp32. [default: fp16]")
@click.option("--batch", metavar="N,N,N", help="Pictures at once: min, opt, max. [default: 1,1,4]")
@click.option("--sides", metavar="N,N,N", help="Pixels of height and width: min, opt, max. [default: 384,512,1024]")
@click.option(
    "--sm",
    multiple=True,
    metavar="N.N",
    help="Compute capability to compile for (tensorrt-rtx), e.g. 8.9, or 8.6,8.9,12.0. [default: portable]",
)
@json_option
@debug_option
def compile_command(
    bundle: str | None,
    backend: TrtFlavor,
    out: Path | None,
    graphs: tuple[str, ...],
    sm: tuple[str, ...],
    sides: str | None,
    batch: str | None,
    compute_dtype: str | None,
) -> None:
    """Compile the graphs of BUNDLE (a folder or a name; the embedded one) for NVIDIA GPUs.

    tensorrt-rtx compiles on any machine, for the compute capabilities that --sm names; tensorrt only where the GPU is.
    Engines that are there and still fit are left alone. Styles are inputs of an engine: they are never compiled.
    """
    from lsast_engines.bundle.bundle import find_bundle

    from ..tensorrt.compile import CompileOptions

    chosen: dict[str, Any] = {} if compute_dtype is None else {"compute_dtype": compute_dtype}
    spans = {"side": _span("--sides", sides), "batch": _span("--batch", batch)}
    ranges = ShapeRanges(**{name: span for name, span in spans.items() if span is not None})
    targets = tuple(dict.fromkeys(target.strip() for text in sm for target in text.split(",") if target.strip()))
    options = CompileOptions(backend, targets, ranges, **chosen)
    facts = compile_engines(find_bundle(bundle), options, out, graphs)
    print_result(facts, facts["engines"])


def compile_engines(
    bundle: Path, options: CompileOptions, out: Path | None = None, graphs: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Compile as `compile_bundle` does, tell on stderr what memory the engines need, and return the facts."""
    from lsast_engines.backends.tensorrt.engine_record import engine_folder

    from ..tensorrt.compile import compile_bundle

    phases = PhaseTimer()
    records = compile_bundle(bundle, options, out, phases, graphs)
    for name, record in records.items():
        needs = f"{record.bytes / 1e9:.2f} GB, and {record.activation_bytes / 1e9:.2f} GB while it runs"
        phases.figure(f"{name}: {needs}")
    activations = max((record.activation_bytes for record in records.values()), default=0)
    total = activations + sum(record.bytes for record in records.values())
    phases.figure(
        f"total activation memory up to {options.ranges.side.max} pixels: {activations / 1e9:.2f} GB, the "
        f"largest, which the engines share as they run one after the other; with the engines: {total / 1e9:.2f} GB"
    )
    return {
        "bundle": str(bundle),
        "engines": str(out or engine_folder(bundle, options.library, options.compute_dtype)),
        "graphs": {
            name: {
                "bytes": record.bytes,
                "activation_bytes": record.activation_bytes,
                "seconds": record.seconds,
                "targets": list(record.key.targets),
            }
            for name, record in records.items()
        },
        "activation_bytes": activations,
        "seconds": phases.seconds(),
    }


def _span(option: str, text: str | None) -> Range | None:
    if text is None:
        return None
    try:
        return Range(*map(int, text.split(",")))
    except (TypeError, ValueError) as error:
        raise UsageError(f"found {option} {text}; expected three whole numbers: min,opt,max") from error
