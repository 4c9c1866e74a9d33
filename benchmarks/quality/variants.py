"""What the prompt space is worth: four variants and two generators on the same paintings, over seeds.

    pip install '.[cpu,train]'
    python -m benchmarks.quality.variants --paintings DIR/vincent-van-gogh --out variants --steps 120 --seeds 3

Every run is `lsast-train`'s quick preset with another variant (30, 10, 3 or 1 matrices), generator and seed; its figure
is the held-out loss as a part of the untrained prompts', 1 being no gain. Seeds change initial tokens, noise and order;
the split of the paintings stays. Every run is a file of its own in --out and those that are there are kept, so an
interrupted benchmark goes on and two processes may share the work (`--variant`). The table comes when all are there.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.bench.machine import describe
from lsast_engines.files import replace_file
from lsast_train.base.lazy_base import load_base
from lsast_train.inversion import Inversion
from lsast_train.options import PRESETS
from lsast_train.paintings import PaintingDataset

VARIANTS = {"step+layer": 30, "step": 10, "layer": 3, "global": 1}
"""Variant → its number of matrices."""
GENERATORS = ("attention", "direct")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""97.5 % quantiles of Student's t by number of seeds."""


@click.command()
@click.option("--paintings", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--base", default=None, help="A base's folder or name. [default: the embedded one]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of a JSON file for each run.")
@click.option("--steps", default=120, show_default=True)
@click.option("--seeds", type=click.Choice([str(n) for n in STUDENT]), default="3", show_default=True)
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), help="Only these now.")
@click.option("--threads", type=click.IntRange(1))
def main(
    paintings: Path,
    base: str | None,
    out: Path,
    steps: int,
    seeds: str,
    variants: tuple[str, ...],
    threads: int | None,
) -> None:
    """Run what is missing in --out, then print the table."""
    logging.basicConfig(level=logging.WARNING)
    if threads:
        torch.set_num_threads(threads)
    loaded = load_base(base)
    quick = replace(PRESETS["quick"], steps=steps, evaluate_every=max(1, steps // 3))
    setting = {"base": loaded.fingerprint, "paintings": paintings.name, "steps": steps}
    out.mkdir(parents=True, exist_ok=True)
    collection = None
    for seed, variant, generator in product(range(int(seeds)), variants or VARIANTS, GENERATORS):
        target = run_file(out, variant, generator, seed)
        if target.exists():
            if (found := json.loads(target.read_text())["setting"]) != setting:
                raise click.ClickException(f"{target} is a run of {found}; expected {setting}: choose another --out")
            continue
        collection = collection or PaintingDataset.load(paintings, quick.size, quick.crop, loaded.config.size)
        options = replace(quick, variant=variant, generator=generator, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            outcome = Inversion(loaded, collection, options, "variant", Path(folder)).run()
        record = {
            "setting": setting,
            "relative": outcome.relative_loss,
            "best": outcome.best_step,
            "seconds": outcome.seconds,
            "machine": describe(("torch", "diffusers")),
        }
        with replace_file(target) as handle:
            handle.write(json.dumps(record, indent=1).encode())
    files = [run_file(out, *key) for key in product(VARIANTS, GENERATORS, range(int(seeds)))]
    missing = sum(not file.exists() for file in files)
    click.echo(f"{missing} runs of other variants are missing" if missing else table(out, int(seeds)))


def run_file(out: Path, variant: str, generator: str, seed: int) -> Path:
    return out / f"{variant.replace('+', '_')}-{generator}-{seed}.json"


def table(out: Path, seeds: int) -> str:
    """Markdown: a row for each variant, a column for each generator; mean and 95 % interval over seeds."""
    lines = [f"| matrices | {' | '.join(GENERATORS)} |", "|---|" + "---|" * len(GENERATORS)]
    record: dict[str, Any] = {}
    for variant, count in VARIANTS.items():
        cells = []
        for generator in GENERATORS:
            records = [json.loads(run_file(out, variant, generator, seed).read_text()) for seed in range(seeds)]
            record = records[-1]
            values = [one["relative"] for one in records]
            half = STUDENT[seeds] * statistics.stdev(values) / math.sqrt(seeds)
            cells.append(f"{statistics.mean(values):.4f} ± {half:.4f}")
        lines.append(f"| {count} ({variant}) | {' | '.join(cells)} |")
    setting = record["setting"]
    return "\n".join(
        [*lines, "", f"{setting['paintings']}, {setting['steps']} steps, n = {seeds} seeds; {record['machine']}"]
    )


if __name__ == "__main__":
    main()
