"""Pictures a minute: one by one, in batches, and from eight threads on one stylizer.

    python -m benchmarks.speed.batches PICTURE [--pictures 8] [--size 512] [--batch 2 --batch 4 --batch 8] [--repeats 3]

Every row paints the same pictures in alternating styles. Prints a Markdown table; run nothing else meanwhile.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

import lsast
from benchmarks.bench.machine import describe


def measured(paint: Callable[[], Any], pictures: int, repeats: int) -> dict[str, float]:
    """Pictures a minute of `repeats` runs: median and spread."""
    rates = []
    for _ in range(repeats):
        begin = time.perf_counter()
        paint()
        rates.append(60 * pictures / (time.perf_counter() - begin))
    return {"rate": statistics.median(rates), "spread": max(rates) - min(rates)}


@click.command()
@click.argument("picture", type=click.Path(exists=True, path_type=Path))
@click.option("--pictures", default=8, show_default=True)
@click.option("--backend", default="auto", show_default=True)
@click.option("--size", default=512, show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=(2, 4, 8), show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    picture: Path, pictures: int, backend: str, size: int, batches: tuple[int, ...], repeats: int, as_json: bool
) -> None:
    """Measure one way after another, from the one that needs least memory to the one that needs most."""
    rows = []
    with lsast.load(backend=backend) as stylizer:
        # Styles may have defaults of their own, and only equal steps and control share a batch.
        common = {
            key: stylizer.bundle.manifest.defaults[key] for key in ("steps", "strength", "guidance", "control_scale")
        }
        jobs = [{"style": stylizer.styles[i % 2], "seed": i, "size": size, **common} for i in range(pictures)]
        stylizer.stylize(picture, size=size)

        def row(name: str, paint: Callable[[], Any]) -> None:
            found = measured(paint, pictures, repeats)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append({"way": name, **found, "peak_rss_mb": peak})

        row("one by one", lambda: [stylizer.stylize(picture, **job) for job in jobs])
        with ThreadPoolExecutor(8) as pool:
            row("8 threads", lambda: list(pool.map(lambda job: stylizer.stylize(picture, **job), jobs)))
        for batch in sorted(batches):
            row(
                f"batches of {batch}",
                lambda batch=batch: list(stylizer.stylize_many([picture] * pictures, rows=jobs, batch=batch)),
            )
        facts = {**describe(("lsast", "numpy", "onnxruntime", "openvino")), "backend": stylizer.backend}
    if as_json:
        print(json.dumps({"machine": facts, "n": repeats, "size": size, "pictures": pictures, "rows": rows}, indent=1))
        return
    print(f"{pictures} pictures of {size}², n = {repeats}\n{facts}\n")
    print("| way | pictures a minute (spread) | peak RSS so far, MB |\n|---|---|---|")
    for found in rows:
        print(f"| {found['way']} | {found['rate']:.1f} ({found['spread']:.1f}) | {found['peak_rss_mb']:.0f} |")


if __name__ == "__main__":
    main()
