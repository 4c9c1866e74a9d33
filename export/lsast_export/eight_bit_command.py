"""`lsast-export modelopt`: the denoiser with products of 8 bits, for NVIDIA GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lsast_engines.errors import UsageError

from .compile_command import LIBRARIES, compile_as, compile_options, ranging
from .console import Phases, common, require_extra

SMOOTH = 0.5
"""What int8 is smoothed with if nothing is said: measured in docs/gpu.md."""


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
    "--smooth",
    metavar="ALPHA",
    type=click.FloatRange(0, 1),
    help="How much of what is hard to round moves into weights first, 0 to 1 (SmoothQuant). "
    f"[default: {SMOOTH:g} for int8, nothing for fp8]",
)
@click.option("--no-smooth", is_flag=True, help="Move nothing.")
@click.option(
    "--backend",
    type=click.Choice(LIBRARIES),
    help="Compile the bundle with it by this library, too. [default: tensorrt-rtx with --sm, else none]",
)
@ranging
@common
@click.pass_context
def modelopt_command(
    ctx: click.Context,
    out: Path,
    bundle: str | None,
    kind: str,
    images: Path,
    count: int,
    smooth: float | None,
    no_smooth: bool,
    backend: str | None,
    sm: tuple[str, ...],
    sides: str | None,
    batch: str | None,
    as_json: bool,
) -> None:
    """Write the denoiser of BUNDLE (a folder or a name; the embedded one) with products of 8 bits into the folder OUT.

    For NVIDIA GPUs, by NVIDIA's ModelOpt (pip install 'lsast[modelopt]'); for processors see quantise.

    What it costs in quality on these photographs is measured and printed. With --sm or --backend the bundle's engines
    are compiled where lsast-run --arithmetic int8 (or fp8) finds them: the quantised denoiser, all else in fp16.
    """
    require_extra("onnx", "onnxruntime")
    from lsast_engines.bundle import Bundle, find_bundle
    from lsast_engines.engine_key import PORTABLE
    from lsast_engines.tensorrt_library import load_library

    from .eight_bit import quality, quantise_denoiser
    from .tensorrt import STORED, require_types
    from .trial import find_contents

    if no_smooth and smooth is not None:
        raise UsageError("found --smooth and --no-smooth; expected one of them")
    if smooth is None and kind == "int8" and not no_smooth:
        smooth = SMOOTH
    backend = backend or ("tensorrt-rtx" if sm else None)
    if backend is None and (sides or batch):
        raise UsageError("found --sides or --batch; expected --sm or --backend with it")
    found, file = find_bundle(bundle), out / "denoiser.onnx"
    engines = compile_options(backend, sm, sides, batch, kind, file) if backend else None
    if engines is not None:
        targets = engines.targets or ((PORTABLE,) if engines.library == "tensorrt-rtx" else ())
        require_types({STORED[kind]}, targets, f"{kind} denoiser")
        load_library(engines.library)  # before minutes are spent
    opened, phases = Bundle.open(found), Phases()
    native, multiple = opened.manifest.height, opened.manifest.multiple
    contents, _ = find_contents(images, count, native)
    quantise_denoiser(opened, contents, "fp8" if kind == "fp8" else "int8", file, phases, smooth)
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
        facts |= compile_as(found, engines, phases)
    facts["seconds"] = phases.seconds()
    click.echo(json.dumps(facts) if as_json or ctx.meta.get("lsast.json") else file)
