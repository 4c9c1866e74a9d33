"""What a preset costs in quality: paintings of every preset beside those of the first, scored in one run.

    pip install '.[cpu,eval]'
    python -m benchmarks.quality.presets --contents DIR --paintings DIR --photos DIR --out DIR \
        --style vangogh=vincent-van-gogh --preset exact --preset balanced --preset fast

Prints deception (the share that a classifier of the artists takes for the artist), the distance to the content and edge
F1 as `lsast-eval` has them, and PSNR to the painting of the first preset with the same seed. Paintings that are there
already are kept. Nothing is timed: `python -m benchmarks.bench` does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import lsast
from benchmarks.bench.machine import describe
from benchmarks.quality.compare_peers import paint_all, score
from lsast_engines.images import find_pictures, psnr


def opened(path: Path) -> np.ndarray:
    """A painting, [H, W, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("contents", "paintings", "photos", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--style", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--preset", action="append", required=True)
    parser.add_argument("--bundle")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()

    contents = find_pictures(chosen.contents)
    facts = {}
    with lsast.load(chosen.bundle) as stylizer:
        for pair in chosen.style:
            style, _, folder = pair.partition("=")
            folders = {
                preset: paint_all(
                    chosen.out / style / preset,
                    contents,
                    lambda _, path, style=style, preset=preset: stylizer.stylize(
                        path, style=style, preset=preset, size=chosen.size, seed=chosen.seed
                    ).image.convert("RGB"),
                    f"{style} {preset}",
                )
                for preset in chosen.preset
            }
            report = score(chosen, folder, folders)
            first = folders[chosen.preset[0]]
            distances = {
                preset: [psnr(*(opened(side / f"{path.stem}.png") for side in (where, first))) for path in contents]
                for preset, where in folders.items()
                if where != first
            }
            print(f"\n## {style}\n{report.table()}\n")
            print(f"| preset | PSNR to {chosen.preset[0]}: median | lowest |\n|---|---|---|")
            for preset, values in distances.items():
                print(f"| {preset} | {np.median(values):.1f} dB | {min(values):.1f} dB |", flush=True)
            report.sheet(chosen.out / f"{style}.png")
            facts[style] = {"scores": report.to_json(), "psnr": distances}
    written = {"machine": describe(("lsast", "onnxruntime")), "styles": facts}
    (chosen.out / "presets.json").write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    sys.exit(main())
