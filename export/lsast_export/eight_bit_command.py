"""`lsast-export modelopt`: the denoiser with products of 8 bits, for NVIDIA GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lsast_engines.errors import UsageError

from .compile_command import compile_options
from .console import Phases, common, require_extra


@click.command("modelopt")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("bundle", metavar="BUNDLE", required=False)
@click.option("--to", "kind", type=click.Choice(["int8", "fp8"]), required=True, help="fp8 needs capability 8.9.")
@click.option(
    "--images",
    metavar="DIR",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Photographs to calibrate on.",
)
@click.option("--count", type=click.IntRange(1), default=32, show_default=True, help="How many of them.")
@click.option(
    "--sm", multiple=True, metavar="N.N", help="Compile with TensorRT-RTX for these compute capabilities, too."
)
@click.option("--sides", metavar="N,N,N", help="See compile.")
@click.option("--batch", metavar="N,N,N", help="See compile.")
@common
@click.pass_context
def modelopt_command(
    ctx: click.Context,
    out: Path,
    bundle: str | None,
    kind: str,
    images: Path,
    count: int,
    sm: tuple[str, ...],
    sides: str | None,
    batch: str | None,
    as_json: bool,
) -> None:
    """Write the denoiser of BUNDLE (a folder or a name; the embedded one) with products of 8 bits into the folder OUT.

    For NVIDIA GPUs, by NVIDIA's ModelOpt (pip install 'lsast[modelopt]'); for processors see quantise.

    What it costs in quality on these photographs is measured and printed. With --sm an engine is compiled beside it;
    lsast-run does not take it yet.
    """
    require_extra("onnx", "onnxruntime")
    from lsast_engines.bundle import Bundle, find_bundle
    from lsast_engines.spec import DENOISER

    from .eight_bit import quality, quantise_denoiser
    from .tensorrt import compile_graph, require_types
    from .trial import find_contents

    if not sm and (sides or batch):
        raise UsageError("found --sides or --batch; expected --sm with it")
    engines = compile_options("tensorrt-rtx", sm, sides, batch, "fp32") if sm else None
    if engines is not None:
        require_types({"FLOAT8E4M3FN"} if kind == "fp8" else {"INT8"}, engines.targets, f"{kind} denoiser")
    opened, phases = Bundle.open(find_bundle(bundle)), Phases()
    native, multiple = opened.manifest.height, opened.manifest.multiple
    contents, _ = find_contents(images, count, native)
    file = quantise_denoiser(opened, contents, "fp8" if kind == "fp8" else "int8", out / "denoiser.onnx", phases)
    phases("comparing")
    judged, _ = find_contents(images, min(count, 4), max(native // 2 // multiple, 1) * multiple)
    cost = quality(opened, file, judged)
    click.echo(
        f"           against float32: noise {cost.noise:.1f} dB, latents {cost.latent:.1f} dB, "
        f"decoded {cost.picture:.1f} dB (PSNR)",
        err=True,
    )
    facts: dict[str, object] = {"graph": str(file), "kind": kind, "psnr_db": cost._asdict()}
    if engines is not None:
        spec = opened.manifest.graphs[DENOISER]
        record = compile_graph(file, spec, out / "denoiser.engine", engines, phases)
        facts["engine"] = {"bytes": record.bytes, "seconds": record.seconds, "targets": list(record.key.targets)}
    facts["seconds"] = phases.seconds()
    click.echo(json.dumps(facts) if as_json or ctx.meta.get("lsast.json") else file)
