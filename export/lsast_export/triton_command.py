"""`lsast-export triton`: a model repository of a bundle's graphs for Triton Inference Server."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lsast_engines.errors import UsageError

from .compile_command import compile_options, compiling
from .console import Phases, common, require_extra


@click.command("triton")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("bundle", metavar="BUNDLE", required=False)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    help="What Triton runs the graphs with; tensorrt compiles them here, on its GPU. [default: onnxruntime]",
)
@compiling
@common
@click.pass_context
def triton_command(
    ctx: click.Context,
    folder: Path,
    bundle: str | None,
    backend: str,
    sm: tuple[str, ...],
    sides: str | None,
    batch: str | None,
    arithmetic: str | None,
    as_json: bool,
) -> None:
    """Write the graphs of BUNDLE (a folder or a name; the embedded one) into DIR, Triton's model repository.

    Each graph becomes a model, mini_denoiser and so on. --arithmetic, --batch and --sides are for --backend tensorrt,
    whose engines serve GPUs of this kind only, in a server with this very version of TensorRT.
    """
    require_extra("onnx", "onnx_ir")
    from lsast_engines.bundle import find_bundle

    from .triton import write_repository

    given = {"--sm": sm, "--sides": sides, "--batch": batch, "--arithmetic": arithmetic}
    unused = [option for option, value in given.items() if value]
    if backend == "onnxruntime" and unused:
        raise UsageError(f"found {', '.join(unused)}; expected --backend tensorrt with it: only engines are compiled")
    engines = compile_options(backend, sm, sides, batch, arithmetic) if backend == "tensorrt" else None
    phases = Phases()
    models = write_repository(find_bundle(bundle), folder, engines, phases)
    facts = {
        "repository": str(folder),
        "backend": backend,
        "models": {name: str(model) for name, model in models.items()},
        "seconds": phases.seconds(),
    }
    click.echo(json.dumps(facts) if as_json or ctx.meta.get("lsast.json") else folder)
