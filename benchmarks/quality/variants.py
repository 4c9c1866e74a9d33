"""What the prompt space is worth: its variants and two generators on the same paintings, over seeds.

    pip install '.[cpu,train]'
    python -m benchmarks.quality.variants --paintings DIR/vincent-van-gogh --out variants --steps 3000 --batch 4

Every run is `lsast-train`'s quick preset with another variant (30, 10, 3 or 1 matrices), generator and seed. ``warm``
learns 1 matrix in the first third of the steps, 10 that start as copies of it in the second, 30 that start as copies
of these in the last; in each third the learning rate falls to zero.

The figure of a run is the part that it gains of what can be gained: (initial - found) / (initial - own), in held-out
loss. *own* is the loss with the style tokens that the base's encoder reads from each held-out crop itself: no prompt of
an artist knows more of a picture. 0 is the untrained prompt. Seeds change initial tokens, noise and order; the split of
the paintings stays. Every run is a file of its own in --out and those that are there are kept, so an interrupted
benchmark goes on and two processes may share the work (`--variant`). The table has the seeds of which all runs exist.
"""

import copy
import json
import logging
import math
import shutil
import statistics
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import click
import torch

from benchmarks.bench.machine import describe
from lsast_engines.files import replace_file
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import load_base
from lsast_train.evaluation import ValidationSet
from lsast_train.inversion import Inversion
from lsast_train.options import PRESETS, MixedPrecision, TrainOptions, Variant
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_space import PromptSpace

MATRICES = {"step+layer": "30", "step": "10", "layer": "3", "global": "1", "warm": "1, 10, 30"}
"""Variant → its number of matrices."""
WARM_START: tuple[Variant, ...] = ("global", "step", "step+layer")
"""The variants of ``warm``, one after another."""
GENERATORS = ("attention", "direct")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantiles of Student's t by number of seeds."""


@click.command()
@click.option("--paintings", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--base", default=None, help="A base's folder or name. [default: the embedded one]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of a JSON file for each run.")
@click.option("--steps", default=120, show_default=True)
@click.option("--batch", default=12, show_default=True)
@click.option("--seeds", type=click.IntRange(1, 10), default=3, show_default=True)
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(MATRICES)), help="Only these now.")
@click.option("--mixed-precision", default="no", show_default=True, type=click.Choice(get_args(MixedPrecision)))
@click.option("--threads", type=click.IntRange(1))
def main(
    paintings: Path,
    base: str | None,
    out: Path,
    steps: int,
    batch: int,
    seeds: int,
    variants: tuple[str, ...],
    mixed_precision: MixedPrecision,
    threads: int | None,
) -> None:
    """Run what is missing in --out, then print the table."""
    logging.basicConfig(level=logging.WARNING)
    if threads:
        torch.set_num_threads(threads)
    loaded = load_base(base)
    every = max(1, steps // 12)
    quick = replace(PRESETS["quick"], steps=steps, batch=batch, evaluate_every=every, mixed_precision=mixed_precision)
    setting = {
        "base": loaded.fingerprint,
        "paintings": paintings.name,
        "steps": steps,
        "batch": batch,
        "mixed_precision": mixed_precision,
    }
    out.mkdir(parents=True, exist_ok=True)
    collection = PaintingDataset.load(paintings, quick.size, quick.crop, loaded.config.size)
    for seed, generator, variant in product(range(seeds), GENERATORS, variants or MATRICES):
        target = run_file(out, variant, generator, seed)
        if target.exists():
            if (found := json.loads(target.read_text())["setting"]) != setting:
                raise click.ClickException(f"{target} is a run of {found}; expected {setting}: choose another --out")
            continue
        options = replace(quick, generator=generator, seed=seed)
        prompts = target.with_suffix(".prompts.safetensors")
        record = run(loaded, collection, options, WARM_START if variant == "warm" else (variant,), prompts)
        with replace_file(target) as handle:
            handle.write(json.dumps({"setting": setting, **record}, indent=1).encode())
        click.echo(f"{target.name}: {record['gained']:.4f} in {record['seconds']:.0f} s")
    click.echo(table(out))


def run(
    base: Base, paintings: PaintingDataset, options: TrainOptions, variants: tuple[Variant, ...], prompts: Path
) -> dict[str, Any]:
    """Learn the `variants` one after another, each from the last one's prompts, in equal parts of the steps.

    The last one's prompts are written to the file `prompts`.
    """
    before: PromptSpace | None = None
    initial = own = found = math.nan
    seconds, best = 0.0, []
    for variant in variants:
        part = replace(options, variant=variant, steps=options.steps // len(variants))
        with tempfile.TemporaryDirectory() as folder:
            inversion = Inversion(base, paintings, part, "variant", Path(folder))
            if before is None:
                initial = held_out_loss(inversion.held_out, inversion.space)
                own = own_loss(base, inversion.held_out, inversion.space.stages)
            else:
                copy_prompts(before, inversion.space)
            result = inversion.run()
            shutil.copyfile(result.file, prompts)
        before = copy.deepcopy(inversion.best)
        found = held_out_loss(inversion.held_out, before)
        seconds += result.seconds
        best.append(result.best_step)
    return {
        "gained": (initial - found) / (initial - own),
        "initial": initial,
        "found": found,
        "own": own,
        "best": best,
        "seconds": seconds,
        "machine": describe(("torch", "diffusers")),
    }


def held_out_loss(held_out: ValidationSet, space: PromptSpace) -> float:
    return float(held_out.losses(space, range(space.stages)).mean())


def own_loss(base: Base, held_out: ValidationSet, stages: int) -> float:
    """The held-out loss with the style tokens of each crop itself."""
    if base.style_encoder is None:
        raise click.ClickException(f"base {base.config.name} has no style encoder; expected one, as mini has")
    with torch.no_grad():
        tokens = base.style_encoder(held_out.latents)
    own = _OwnTokens(tokens, stages)
    return float(held_out.losses(own, range(stages)).mean())  # type: ignore[arg-type]


class _OwnTokens:
    """Stands for a prompt space whose prompts are the pictures' own; rows come in the order of `ValidationSet`."""

    def __init__(self, tokens: torch.Tensor, stages: int) -> None:
        self.tokens, self.stages, self.row = tokens, stages, 0

    def contexts_by_group(self, timestep: torch.Tensor, dropout: object) -> tuple[torch.Tensor, ...]:
        rows = (self.row + torch.arange(len(timestep))) % len(self.tokens)
        self.row += len(timestep)
        return (self.tokens[rows],) * 3


def copy_prompts(source: PromptSpace, target: PromptSpace) -> None:
    """Start `target` at the prompts of `source`, whose matrices serve more stages and groups each."""
    with torch.no_grad():
        target.matrices[target.table.flatten()] = source.matrices[source.table.flatten()]
        for name, weight in target.attention_weights().items():
            weight.copy_(source.attention_weights()[name])


def run_file(out: Path, variant: str, generator: str, seed: int) -> Path:
    return out / f"{variant.replace('+', '_')}-{generator}-{seed}.json"


def table(out: Path) -> str:
    """Markdown: a row for each variant, a column for each generator; mean and 95 % interval over seeds."""
    cases = list(product(MATRICES, GENERATORS))
    runs = {
        (*case, seed): json.loads(file.read_text())
        for case in cases
        for seed in range(max(STUDENT))
        if (file := run_file(out, *case, seed)).exists()
    }
    seeds = [seed for seed in range(max(STUDENT)) if all((*case, seed) in runs for case in cases)]
    if not seeds:
        return f"{len(runs)} runs; a table needs all {len(cases)} of a seed"
    lines = [f"| matrices | {' | '.join(GENERATORS)} |", "|---|" + "---|" * len(GENERATORS)]
    for variant, matrices in MATRICES.items():
        cells = []
        for generator in GENERATORS:
            values = [runs[variant, generator, seed]["gained"] for seed in seeds]
            mean = f"{statistics.mean(values):.3f}"
            if len(seeds) > 1:
                mean += f" ± {STUDENT[len(seeds)] * statistics.stdev(values) / math.sqrt(len(seeds)):.3f}"
            cells.append(mean)
        lines.append(f"| {matrices} ({variant}) | {' | '.join(cells)} |")
    record = next(iter(runs.values()))
    setting = record["setting"]
    title = f"{setting['paintings']}, {setting['steps']} steps of {setting['batch']}"
    title += f" (mixed precision: {setting['mixed_precision']}), n = {len(seeds)} seeds"
    return "\n".join([*lines, "", f"{title}; {record['machine']}"])


if __name__ == "__main__":
    main()
