"""How far apart are the photograph and its repaintings? Distances between styles beside distances between seeds.

    python -m benchmarks.quality.styles_apart PICTURE … [--style vangogh --style monet]

A style that only reshuffled the noise would differ from another style as much as from itself under another seed. Two
distances, both means over the pictures: *palette*, the Euclidean distance of the pictures' means and spreads of
L*, a* and b*; *texture*, the mean absolute difference of the log energy of eight oriented band-pass filters.
"""

from itertools import combinations
from pathlib import Path

import click
import cv2
import numpy as np
import numpy.typing as npt

import lsast
from benchmarks.bench.machine import describe
from lsast_engines.images import read_picture


def lab(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """CIE L*a*b* of 8-bit RGB, float32 [H, W, 3]."""
    return cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def palette_distance(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Distance of the six numbers mean and standard deviation of L*, a*, b*, in units of CIE76 ΔE."""
    numbers = [np.concatenate([lab(x).mean((0, 1)), lab(x).std((0, 1))]) for x in (a, b)]
    return float(np.linalg.norm(numbers[0] - numbers[1]))


def texture(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Log energy of L* in Gabor bands: four orientations at wavelengths of 4 and 8 pixels, [8]."""
    light = lab(rgb)[:, :, 0]
    bands = [
        cv2.filter2D(light, -1, cv2.getGaborKernel((21, 21), wave / 2, angle, wave, 1, 0))
        for wave in (4, 8)
        for angle in np.arange(4) * np.pi / 4
    ]
    return np.array([np.log(np.var(band) + 1e-6) for band in bands])


def texture_distance(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Mean absolute difference of the log band energies."""
    return float(np.abs(texture(a) - texture(b)).mean())


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--style", "styles", multiple=True, help="Styles to compare. [default: all there are]")
def main(pictures: tuple[Path, ...], styles: tuple[str, ...]) -> None:
    """Paint every picture in every style under two seeds and print the mean distances."""
    with lsast.load() as stylizer:
        names = styles or tuple(stylizer.styles)
        rows: dict[str, list[tuple[float, float]]] = {}
        for path in pictures:
            photo = read_picture(path).rgb
            painted = {
                (name, seed): np.asarray(stylizer.stylize(path, style=name, seed=seed).image.convert("RGB"))
                for name in names
                for seed in (1, 2)
            }
            for name in names:
                pairs = {f"photo / {name}": (photo, painted[name, 1]),
                         f"{name} / {name}, other seed": (painted[name, 1], painted[name, 2])}  # fmt: skip
                for key, pair in pairs.items():
                    rows.setdefault(key, []).append((palette_distance(*pair), texture_distance(*pair)))
            for one, two in combinations(names, 2):
                pair = (painted[one, 1], painted[two, 1])
                rows.setdefault(f"{one} / {two}", []).append((palette_distance(*pair), texture_distance(*pair)))
        print(f"n = {len(pictures)} pictures, backend {stylizer.backend}")
        print(describe(("lsast", "onnxruntime", "openvino")), end="\n\n")
    print("| between | palette ΔE | texture |\n|---|---|---|")
    for key, values in rows.items():
        palette, grain = np.mean(values, axis=0)
        print(f"| {key} | {palette:.1f} | {grain:.2f} |")


if __name__ == "__main__":
    main()
