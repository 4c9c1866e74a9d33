"""What smoothing (SmoothQuant) does to paintings in int8: PSNR to float of held-out pictures, for several alphas.

    python -m benchmarks.quality.smoothquant PICTURES --pictures 12 --alpha 0.3 --alpha 0.5 --alpha 0.7

The graph is calibrated once, on every second picture; the others are painted from the same noise by the float graph, by
the int8 graph, and by the int8 graph smoothed with each alpha. Prints a Markdown table; the gain is the mean difference
to no smoothing picture by picture, with its standard error. Nothing is timed.
"""

import statistics
import tempfile
from pathlib import Path

import click

from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import Bundle, find_bundle
from lsast_engines.bundle.graph_spec import DENOISER
from lsast_engines.images import psnr
from lsast_export.quantize.calibration import Calibration
from lsast_export.quantize.paintings import load_calibration_images, paint
from lsast_export.quantize.weights import NAME, WeightFile

BACKEND = "onnxruntime"


@click.command()
@click.argument("images", type=click.Path(exists=True, path_type=Path))
@click.option("--bundle", default=None, help="In fp32, fp16 or bf16; the embedded one.")
@click.option("--pictures", default=12, show_default=True, help="To calibrate on, and as many others to judge by.")
@click.option("--size", default=256, show_default=True)
@click.option("--alpha", "alphas", type=float, multiple=True, default=(0.5,), show_default=True)
def main(images: Path, bundle: str | None, pictures: int, size: int, alphas: tuple[float, ...]) -> None:
    """Measure on the pictures in the folder IMAGES."""
    source = Bundle.open(find_bundle(bundle))
    contents, _ = load_calibration_images(images, 2 * pictures, size)
    styles = list(source.styles())
    spec = source.manifest.graphs[DENOISER]
    turned = [*styles[1:], *styles[:1]]
    expected = paint(source, contents[1::2], turned, BACKEND, seed=1000)
    with tempfile.TemporaryDirectory() as scratch:
        calibration = Calibration(source.graph_path(DENOISER), spec, Path(scratch))
        paint(source, contents[::2], styles, BACKEND, {DENOISER: calibration}, strength=1.0)
        found: dict[float | None, list[float]] = {}
        for alpha in (None, *alphas):
            if alpha is not None:
                calibration.smooth(calibration.smoothing_factors(alpha))
            with tempfile.TemporaryDirectory(dir=scratch) as name:
                folder = Path(name)
                model = calibration.quantized(calibration.float_layers)
                with (folder / NAME).open("wb") as file:
                    WeightFile(file).save(model, calibration.folder, f"{DENOISER}.onnx")
                engine = open_engine(folder / f"{DENOISER}.onnx", spec, BACKEND, "cpu")
                painted = paint(source, contents[1::2], turned, BACKEND, {DENOISER: engine}, seed=1000)
            found[alpha] = [psnr(*pair) for pair in zip(painted, expected, strict=True)]
            click.echo(f"alpha {alpha}: {statistics.mean(found[alpha]):.2f} dB", err=True)
    print(f"{source.manifest.name}, {size} pixels, {pictures} held-out pictures, styles {', '.join(styles)}\n")
    print("| alpha | mean PSNR dB | least | gain dB (standard error) |")
    print("|---|---|---|---|")
    for alpha, values in found.items():
        gains = [one - other for one, other in zip(values, found[None], strict=True)]
        spread = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        gain = "" if alpha is None else f"{statistics.mean(gains):+.2f} ({spread:.2f})"
        print(f"| {alpha or 'none'} | {statistics.mean(values):.2f} | {min(values):.2f} | {gain} |")


if __name__ == "__main__":
    main()
