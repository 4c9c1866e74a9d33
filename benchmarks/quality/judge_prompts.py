"""Prompt files of one artist, judged side by side: which of several trainings paints best.

    pip install '.[cpu,eval,train,export]'
    python -m benchmarks.quality.judge_prompts --contents DIR --paintings DIR --photos DIR --out DIR \
        --artist vincent-van-gogh embedded=vangogh new=runs/vangogh/vangogh.prompts.safetensors \
        'gentle=runs/vangogh/vangogh.prompts.safetensors,strength:0.5,guidance:3'

Each METHOD=PROMPTS is baked for the bundle and paints all contents with the prompts' own default options, after which
options may follow. A name of an embedded style stands for its prompts. Scores as in `compare_peers`; paintings that are
there already are kept, so a method's name stands for the same prompts and options always.
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import lsast
from benchmarks.quality.compare_peers import paint_all, painter, score
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.images import find_pictures
from lsast_export.styles.bake import KVProjector, bake_prompts, read_prompts

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("methods", nargs=-1, required=True, metavar="METHOD=PROMPTS[,OPTION:VALUE]...")
@click.option("--contents", required=True, type=FOLDER)
@click.option("--paintings", required=True, type=FOLDER, help="A folder for each artist.")
@click.option("--photos", required=True, type=FOLDER, help="Photographs for the judges.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="For the paintings.")
@click.option("--artist", required=True, help="The artist's folder in --paintings.")
@click.option("--bundle", "of", help="The bundle that paints. [default: the embedded one]")
@click.option("--every", default=1, show_default=True, help="Every so many-th content only.")
@click.option("--size", default=512, show_default=True)
@click.option("--threads", type=click.IntRange(1))
def main(
    methods: tuple[str, ...],
    contents: Path,
    paintings: Path,
    photos: Path,
    out: Path,
    artist: str,
    of: str | None,
    every: int,
    size: int,
    threads: int | None,
) -> None:
    """Paint with every method and print the scores."""
    chosen = find_pictures(contents)[::every]
    shown = out / f"contents-{every}"
    shown.mkdir(parents=True, exist_ok=True)
    for path in chosen:
        if not (link := shown / path.name).exists():
            link.symlink_to(path.resolve())
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch, "bundle")
        with lsast.load(of) as stylizer:
            shutil.copytree(stylizer.bundle.path, bundle)
        options = bake(methods, Bundle.open(bundle))
        with lsast.load(bundle, threads=threads) as stylizer:
            folders = {
                method: paint_all(
                    out / method, chosen, painter(stylizer, style=method, size=size, seed=0, **own), method
                )
                for method, own in options.items()
            }
    click.echo(score(shown, paintings, photos, artist, folders).table())


def bake(methods: tuple[str, ...], bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Bake the prompts of each method into the bundle, as a style of the method's name; its options by method."""
    projector, found = KVProjector.of_bundle(bundle), {}
    for method in methods:
        name, _, rest = method.partition("=")
        prompts, *options = rest.split(",")
        (read,) = read_prompts([prompts], bundle=bundle.path)
        bake_prompts(projector, replace(read, name=name)).save(bundle.path / "styles" / f"{name}.safetensors")
        found[name] = {key: json.loads(value) for key, _, value in (option.partition(":") for option in options)}
    return found


if __name__ == "__main__":
    main()
