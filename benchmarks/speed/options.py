"""What each option gains and costs: seconds a picture, and how far the picture is from the exact one of the same seed.

    python -m benchmarks.speed.options PICTURE... [--style vangogh --style monet] [--size 512] [--repeats 3] [--json]

Every option of docs/guides/speed.md alone, then the presets, in one process, warm: each picture in each style is
painted once unmeasured, then `--repeats` times, the options in turn. Seconds are the median over pictures and styles
of their medians, in brackets how far these lie apart; PSNR is over all values of the picture, mean and least over
pictures and styles. Prints a Markdown table; run nothing else meanwhile.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import lsast
from benchmarks.bench.machine import describe
from lsast.options.options import PRESETS
from lsast_engines.cli import finite_json
from lsast_engines.images import psnr

OPTION_SETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "full U-Net every 2nd step": {"cache_interval": 2},
    "full U-Net every 3rd step": {"cache_interval": 3},
    "unipc, 8 steps": {"solver": "unipc", "steps": 8},
    "no guidance": {"guidance": 1.0},
    **{f"preset {name}": {"preset": name} for name in PRESETS if name not in ("exact", "released")},
}
"""By name, what differs from the defaults; the first is what the others are compared with."""


def pixels(result: lsast.Result) -> np.ndarray:
    """A painting, [H, W, 3]."""
    return np.asarray(result.image.convert("RGB"))


Key = tuple[str, Path, str]
"""Name of the options, picture, style."""


def measured(
    stylizer: lsast.Stylizer, jobs: list[tuple[Path, str]], size: int, repeats: int
) -> tuple[dict[Key, lsast.Result], dict[Key, float], dict[Key, float]]:
    """What every set of options gives for every job, the median seconds, and of these the denoising's.

    They take turns within each repeat, so that a machine that grows slower does so for all.
    """
    results: dict[Key, lsast.Result] = {}
    walls: dict[Key, list[float]] = {}
    loops: dict[Key, list[float]] = {}
    for turn in range(1 + repeats):  # the first is unmeasured
        for picture, style in jobs:
            for name, options in OPTION_SETS.items():
                key = name, picture, style
                begin = time.perf_counter()
                results[key] = stylizer.stylize(picture, **{"style": style, "size": size, **options})
                if turn:
                    walls.setdefault(key, []).append(time.perf_counter() - begin)
                    loops.setdefault(key, []).append(results[key].seconds["denoise"])
    medians = [{key: statistics.median(found) for key, found in table.items()} for table in (walls, loops)]
    return results, medians[0], medians[1]


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--style", "styles", multiple=True, default=("vangogh", "monet"), show_default=True)
@click.option("--bundle", help="Folder or name of a bundle. [default: mini]")
@click.option("--backend", default="auto", show_default=True)
@click.option("--compute-dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--threads", type=int, help="[default: the backend's choice]")
@click.option("--size", default=512, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    pictures: tuple[Path, ...],
    styles: tuple[str, ...],
    bundle: str | None,
    backend: str,
    compute_dtype: Any,
    threads: int | None,
    size: int,
    repeats: int,
    as_json: bool,
) -> None:
    """Measure one set of options after another."""
    jobs = [(picture, style) for picture in pictures for style in styles]
    rows: list[dict[str, Any]] = []
    with lsast.load(bundle, backend, threads=threads, compute_dtype=compute_dtype) as stylizer:
        results, walls, loops = measured(stylizer, jobs, size, repeats)
        for name, options in OPTION_SETS.items():
            seconds = [walls[(name, *job)] for job in jobs]
            distances = [psnr(pixels(results[(name, *job)]), pixels(results[("exact", *job)])) for job in jobs]
            rows.append(
                {
                    "name": name,
                    "options": options,
                    "seconds": statistics.median(seconds),
                    "spread_s": max(seconds) - min(seconds),
                    "denoise_s": statistics.median(loops[(name, *job)] for job in jobs),
                    "psnr_mean": None if name == "exact" else statistics.fmean(distances),
                    "psnr_least": None if name == "exact" else min(distances),
                }
            )
        facts = {
            **describe(("lsast", "numpy", "onnxruntime", "openvino")),
            "bundle": stylizer.bundle.manifest.name,
            "backend": stylizer.backend,
            "compute_dtype": compute_dtype,
            "threads": "the backend's choice" if threads is None else str(threads),
        }
    if as_json:
        told = {"machine": facts, "n": repeats, "size": size, "styles": styles, "pictures": len(pictures)}
        print(json.dumps(finite_json({**told, "rows": rows}), indent=1))
        return
    print(f"{size}² pixels, {len(pictures)} pictures in {', '.join(styles)}, n = {repeats} each\n{facts}\n")
    print("| options | s a picture (spread) | times exact | denoise s | PSNR to exact, mean | least |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        quality = " | | " if row["psnr_mean"] is None else f" {row['psnr_mean']:.1f} | {row['psnr_least']:.1f} "
        print(
            f"| {row['name']} | {row['seconds']:.2f} ({row['spread_s']:.2f}) "
            f"| {rows[0]['seconds'] / row['seconds']:.2f} | {row['denoise_s']:.2f} |{quality}|"
        )


if __name__ == "__main__":
    main()
