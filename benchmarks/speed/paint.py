"""Seconds and memory of painting one picture: cold (a new process, `lsast-run`) and warm (an open Stylizer).

    python -m benchmarks.speed.paint PICTURE [--backend onnxruntime --backend openvino] [--size 512] [--repeats 5]

Prints a Markdown table; run nothing else meanwhile.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

import lsast
from benchmarks.bench.machine import describe


def cold(picture: Path, backend: str, size: int) -> tuple[float, float]:
    """Wall seconds and peak RSS in MB of one `lsast-run` process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lsast", str(picture), str(Path(folder) / "out.png"),
                   "--backend", backend, "--size", str(size)]  # fmt: skip
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
    # The largest child so far: only the first row of a run of this script tells one backend's own peak.
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


@click.command()
@click.argument("picture", type=click.Path(exists=True, path_type=Path))
@click.option("--backend", "backends", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--size", default=512, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(picture: Path, backends: tuple[str, ...], size: int, repeats: int, as_json: bool) -> None:
    """Measure one backend after another."""
    facts = describe(("lsast", "numpy", "onnxruntime", "openvino"))
    rows = []
    for backend in backends:
        colds = [cold(picture, backend, size) for _ in range(repeats)]
        with lsast.load(backend=backend) as stylizer:
            stylizer.stylize(picture, size=size)
            warm, phases = [], {}
            for _ in range(repeats):
                begin = time.perf_counter()
                result = stylizer.stylize(picture, size=size)
                warm.append(time.perf_counter() - begin)
                phases = result.seconds
            options = result.options
        rows.append(
            {
                "backend": backend,
                "cold_s": statistics.median(seconds for seconds, _ in colds),
                "cold_spread_s": max(s for s, _ in colds) - min(s for s, _ in colds),
                "warm_s": statistics.median(warm),
                "warm_spread_s": max(warm) - min(warm),
                "peak_rss_mb": max(rss for _, rss in colds),
                "phases": phases,
            }
        )
    if as_json:
        print(json.dumps({"machine": facts, "n": repeats, "size": size, "rows": rows}, indent=1))
        return
    print(f"{size}² pixels, n = {repeats}, {options}\n{facts}\n")
    print("| backend | cold s (spread) | warm s (spread) | peak RSS MB | denoise s | decode s |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['backend']} | {row['cold_s']:.2f} ({row['cold_spread_s']:.2f}) | {row['warm_s']:.2f} "
            f"({row['warm_spread_s']:.2f}) | {row['peak_rss_mb']:.0f} | {row['phases']['denoise']:.2f} "
            f"| {row['phases']['decode']:.2f} |"
        )


if __name__ == "__main__":
    main()
