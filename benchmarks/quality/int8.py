"""What 8 bits gain and cost: a denoiser step, a painting, memory and nearness of fp32, bf16 and int8.

    lsast-export quantize --out engines/mini-int8
    python -m benchmarks.quality.int8 PICTURE… --int8 engines/mini-int8

Every row is a process of its own, so that its peak memory is its own; rounds go through all rows again and again, so
that what else the machine does meets all of them. PSNR is that of the painting to ONNX Runtime's in fp32, of the same
picture and seed, mean over the pictures. Prints a Markdown table, or JSON; run nothing else meanwhile.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.bench.machine import describe
from lsast_engines.cli import finite_json

ROWS = (
    ("onnxruntime", "fp32", "float"),
    ("onnxruntime", "fp32", "int8"),
    ("openvino", "fp32", "float"),
    ("openvino", "bf16", "float"),
    ("openvino", "fp32", "int8"),
    ("openvino", "bf16", "int8"),
)
"""Backend, compute dtype, bundle."""


@click.command()
@click.argument("pictures", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--bundle", default=None, help="In fp32, fp16 or bf16; the embedded one.")
@click.option("--int8", "int8", required=True, help="What quantize made of it.")
@click.option("--size", default=512, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Processes for each row.")
@click.option("--threads", type=int, default=None, help="Default: what the backend takes.")
@click.option("--json", "as_json", is_flag=True)
def main(
    pictures: tuple[Path, ...],
    bundle: str | None,
    int8: str,
    size: int,
    rounds: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure all rows on PICTURES."""
    if not pictures:
        raise click.UsageError("found no picture; expected one or more")
    bundles = {"float": bundle, "int8": int8}
    with tempfile.TemporaryDirectory() as scratch:
        found: list[list[dict[str, Any]]] = [[] for _ in ROWS]
        for _ in range(rounds):
            for place, (backend, compute_dtype, kind) in enumerate(ROWS):
                job = {
                    "pictures": [str(picture.resolve()) for picture in pictures],
                    "bundle": bundles[kind],
                    "backend": backend,
                    "compute_dtype": compute_dtype,
                    "size": size,
                    "threads": threads,
                    "out": f"{scratch}/{place}.npy",
                }
                child = subprocess.run(
                    [sys.executable, "-m", "benchmarks.quality.int8", "--child", json.dumps(job)],
                    stdout=subprocess.PIPE,
                    check=False,
                    text=True,
                )
                if child.returncode:
                    raise click.ClickException(f"{backend} {compute_dtype} {kind} failed, see above")
                found[place].append(json.loads(child.stdout))
        rows = [
            _row(ROWS[place], found[place], f"{scratch}/{place}.npy", f"{scratch}/0.npy") for place in range(len(ROWS))
        ]
    facts = describe(("lsast", "numpy", "onnxruntime", "openvino"))
    if as_json:
        told = {"machine": facts, "size": size, "pictures": len(pictures), "rounds": rounds, "rows": rows}
        print(json.dumps(finite_json(told), indent=1))
        return
    print(
        f"{size} pixels, {len(pictures)} pictures, {rounds} processes a row, threads {threads or 'default'}\n{facts}\n"
    )
    print("| backend | compute dtype | bundle | step s (spread) | painting s (spread) | peak RSS MB | PSNR dB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["backend"], row["compute_dtype"], row["bundle"]]
        cells += [f"{row[f'{name}_s']:.3f} ({row[f'{name}_spread_s']:.3f})" for name in ("step", "painting")]
        print(f"| {' | '.join(cells)} | {row['peak_rss_mb']:.0f} | {row['psnr_db']:.1f} |")


def _row(kind: tuple[str, str, str], runs: list[dict[str, Any]], out: str, reference: str) -> dict[str, Any]:
    import numpy as np

    from lsast_engines.images import psnr

    row: dict[str, Any] = dict(zip(("backend", "compute_dtype", "bundle"), kind, strict=True))
    for name in ("step", "painting"):
        values = [run[f"{name}_s"] for run in runs]
        row[f"{name}_s"], row[f"{name}_spread_s"] = statistics.median(values), max(values) - min(values)
    row["step_cpu_s"] = min(run["step_cpu_s"] for run in runs)
    row["peak_rss_mb"] = max(run["peak_rss_mb"] for run in runs)
    row["psnr_db"] = statistics.mean(map(psnr, np.load(out), np.load(reference)))
    return row


def child(job: dict[str, Any]) -> dict[str, float]:
    """Paint every picture twice, the second time by the clock; seconds of a step are those of its denoising."""
    import resource

    import cv2
    import numpy as np

    import lsast

    painted, seconds, steps, cpu = [], [], [], []
    options = {"size": job["size"], "fit": "stretch", "seed": 1}
    with lsast.load(
        job["bundle"], backend=job["backend"], compute_dtype=job["compute_dtype"], threads=job["threads"]
    ) as stylizer:
        for picture in job["pictures"]:
            stylizer.stylize(picture, **options)
            counted = []
            begin, began = time.perf_counter(), time.process_time()
            result = stylizer.stylize(
                picture, **options, on_step=lambda done, total, _, counted=counted: counted.append(total)
            )
            seconds.append(time.perf_counter() - begin)
            steps.append(result.seconds["denoise"] / counted[0])
            cpu.append((time.process_time() - began) / counted[0])
            # All of one size, to lie in one file.
            image = np.asarray(result.image.convert("RGB"))
            painted.append(cv2.resize(image, (job["size"], job["size"]), interpolation=cv2.INTER_AREA))
    np.save(job["out"], np.stack(painted))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "step_s": statistics.median(steps),
        "step_cpu_s": min(cpu),
        "painting_s": statistics.median(seconds),
        "peak_rss_mb": peak,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
    else:
        main()
