"""Large pictures: does a tile's border show, and how much memory do they take?

    python -m benchmarks.speed.large seams [PICTURE] [--side 2048] [--tile 1024]
    python -m benchmarks.speed.large memory PICTURE [--side 1024 --side 4096] [--steps 4]

`seams` paints in tiles and whole and compares the gradient energy (mean squared difference of neighbouring pixels, all
channels) across the lines where one tile hands over to the next with that of the rest of the picture. Pictures are not
the same everywhere, so the ratio of the whole painting on the same lines stands beside it. Without PICTURE the source
is coloured 1/f noise, which looks alike everywhere. `memory` prints the peak RSS of an `lsast-run` process for each
size.
"""

import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
from PIL import Image

import lsast
from benchmarks.bench.machine import describe
from lsast.sampling.tiling import TileGrid


def clouds(side: int, seed: int = 0) -> np.ndarray:
    """A picture [side, side, 3] of 1/f noise, as natural pictures have on average, its red, green and blue related."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    spectra = np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency
    waves = np.fft.irfft2(spectra, (side, side))
    mixed = np.einsum("ij,jhw->hwi", [[1, 0.3, 0], [0.8, 0.1, 0.3], [0.6, -0.4, 0.2]], waves)
    return np.clip(128 + 45 * mixed / mixed.std(), 0, 255).astype(np.uint8)


def mosaic(picture: Path, side: int) -> np.ndarray:
    """The picture, repeated in mirror images, [side, side, 3]."""
    rgb = np.asarray(Image.open(picture).convert("RGB"))
    return np.pad(rgb, [(0, max(0, side - n)) for n in rgb.shape[:2]] + [(0, 0)], "symmetric")[:side, :side]


def borders(grid: TileGrid) -> tuple[list[int], list[int]]:
    """Rows and columns of pixels in the middle of the blend between two tiles: where a seam would be."""
    rows, columns = (
        [(before.cells.stop + after.cells.start) * grid.factor // 2 for before, after in pairwise(axis)]
        for axis in (grid.rows, grid.columns)
    )
    return rows, columns


def seam(painting: np.ndarray, grid: TileGrid, reach: int) -> float:
    """Gradient energy across the tiles' borders, and up to `reach` pixels beside them, as a share of that elsewhere."""
    shares = []
    for axis, lines in enumerate(borders(grid)):
        steps = (np.diff(painting.astype(np.float32), axis=axis) ** 2).mean(axis=(1 - axis, 2))
        near = np.zeros(len(steps), bool)
        for line in lines:
            near[line - reach : line + reach - 1] = True
        if lines:
            shares.append(steps[near].mean() / steps[~near].mean())
    return float(np.mean(shares))


@click.group()
def main() -> None:
    """Seams and memory of large pictures."""


@main.command()
@click.argument("picture", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--side", default=2048, show_default=True)
@click.option("--tile", default=1024, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--save", type=click.Path(path_type=Path), help="Folder for both paintings.")
def seams(picture: Path | None, side: int, tile: int, steps: int, save: Path | None) -> None:
    """Gradient energy on tile borders against elsewhere."""
    source = clouds(side) if picture is None else mosaic(picture, side)
    print(describe(("lsast", "numpy", "onnxruntime", "openvino")))
    print(f"{side}² of {picture.name if picture else '1/f noise'}, {steps} steps\n")
    print("| painted | on the line | within 2 px | within 32 px |\n|---|---|---|---|")
    with lsast.load() as stylizer:
        manifest = stylizer.bundle.manifest
        grid = TileGrid.cover((side, side), -(-tile // manifest.multiple) * manifest.multiple, manifest.geometry.factor)
        for name, size in (("whole", 0), (f"in {len(list(grid))} tiles of {tile}²", tile)):
            result = stylizer.stylize(source, size=0, tile=size, steps=steps)
            painting = np.asarray(result.image)
            if save:
                result.save(save / f"{'tiled' if size else 'whole'}-{side}.png")
            shares = " | ".join(f"{seam(painting, grid, reach):.3f}" for reach in (1, 2, 32))
            print(f"| {name} | {shares} |", flush=True)


@main.command()
@click.argument("picture", type=click.Path(exists=True, path_type=Path))
@click.option("--side", "sides", multiple=True, default=(1024, 4096), show_default=True)
@click.option("--steps", default=4, show_default=True)
@click.option("--backend", default="auto", show_default=True)
def memory(picture: Path, sides: tuple[int, ...], steps: int, backend: str) -> None:
    """Peak RSS of painting squares of several sizes."""
    print(describe(("lsast", "numpy", "onnxruntime", "openvino")))
    print("\n| picture | peak RSS |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            source = Path(folder) / f"{side}.png"
            Image.fromarray(mosaic(picture, side)).save(source)
            command = [sys.executable, "-m", "lsast", str(source), str(source.with_name("out.png")), "--size", "0",
                       "--steps", str(steps), "--backend", backend]  # fmt: skip
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise click.ClickException(f"lsast-run ended with {process.returncode}")
            print(f"| {side}² | {usage.ru_maxrss / 1024:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
