"""`lsast-export compile`: engines of a bundle's graphs for NVIDIA GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click

from lsast_engines.backends.tensorrt.engine_record import Library
from lsast_engines.backends.tensorrt.shape_profile import Ranges, Span
from lsast_engines.errors import UsageError
from lsast_engines.removed import removal

from .console import Phases, common, require_extra

LIBRARIES = get_args(Library)


def _refuse(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise UsageError(removal("lsast-export compile --quantised") or "")


@click.command("compile")
@click.argument("bundle", metavar="BUNDLE", required=False)
@click.option("--backend", type=click.Choice(LIBRARIES), required=True, help="The library that compiles.")
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), help="Put engines here, not where lsast-run finds them."
)
@click.option(
    "--graph",
    "graphs",
    metavar="NAME",
    multiple=True,
    help="This graph only; again for others. [default: all but the denoiser's parts]",
)
@click.option(
    "--compute-dtype",
    "--arithmetic",
    "compute_dtype",
    metavar="TYPE",
    help="What engines compute in: fp16 or fp32. [default: fp16]",
)
@click.option("--quantised", expose_value=False, hidden=True, callback=_refuse)
@click.option("--batch", metavar="N,N,N", help="Pictures at once: least, best, most. [default: 1,1,4]")
@click.option("--sides", metavar="N,N,N", help="Pixels of height and width: least, best, most. [default: 384,512,1024]")
@click.option(
    "--sm",
    multiple=True,
    metavar="N.N",
    help="Compute capability to compile for (tensorrt-rtx), e.g. 8.9, or 8.6,8.9,12.0. [default: portable]",
)
@common
@click.pass_context
def compile_command(
    ctx: click.Context,
    bundle: str | None,
    backend: Library,
    out: Path | None,
    graphs: tuple[str, ...],
    sm: tuple[str, ...],
    sides: str | None,
    batch: str | None,
    compute_dtype: str | None,
    as_json: bool,
) -> None:
    """Compile the graphs of BUNDLE (a folder or a name; the embedded one) for NVIDIA GPUs.

    tensorrt-rtx compiles on any machine, for the compute capabilities that --sm names; tensorrt only where the GPU is.
    What is there and still fits is left alone. Styles are inputs of an engine: they are never compiled.
    """
    require_extra("onnx", "onnx_ir")
    from lsast_engines.bundle.bundle import find_bundle

    phases = Phases()
    facts = compiled(find_bundle(bundle), backend, phases, out, sm, sides, batch, compute_dtype, graphs)
    click.echo(json.dumps(facts) if as_json or ctx.meta.get("lsast.json") else facts["engines"])


def compiled(
    bundle: Path,
    backend: str,
    phases: Phases,
    out: Path | None = None,
    sm: tuple[str, ...] = (),
    sides: str | None = None,
    batch: str | None = None,
    compute_dtype: str | None = None,
    graphs: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Compile `bundle` as the options say, and what came of it, for ``--json``.

    Raises:
        UsageError: options that cannot be meant.
    """
    from lsast_engines.backends.tensorrt.engine_record import engine_folder

    from ..tensorrt.compile import CompileOptions, compile_bundle

    chosen: dict[str, Any] = {} if compute_dtype is None else {"compute_dtype": compute_dtype}
    spans = {"side": _span("--sides", sides), "batch": _span("--batch", batch)}
    ranges = Ranges(**{name: span for name, span in spans.items() if span is not None})
    targets = tuple(dict.fromkeys(target.strip() for text in sm for target in text.split(",") if target.strip()))
    library: Library = "tensorrt" if backend == "tensorrt" else "tensorrt-rtx"
    options = CompileOptions(library, targets, ranges, **chosen)
    records = compile_bundle(bundle, options, out, phases, graphs)
    return {
        "bundle": str(bundle),
        "engines": str(out or engine_folder(bundle, options.library, options.compute_dtype)),
        "graphs": {
            name: {"bytes": record.bytes, "seconds": record.seconds, "targets": list(record.key.targets)}
            for name, record in records.items()
        },
        "seconds": phases.seconds(),
    }


def _span(option: str, text: str | None) -> Span | None:
    if text is None:
        return None
    try:
        return Span(*map(int, text.split(",")))
    except (TypeError, ValueError) as error:
        raise UsageError(f"found {option} {text}; expected three whole numbers: least,best,most") from error
