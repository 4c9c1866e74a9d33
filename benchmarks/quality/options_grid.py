"""A grid of strength, guidance and control: what a combination costs in content and gives in style, and how it looks.

    pip install '.[cpu,eval]'
    python -m benchmarks.quality.options_grid --contents DIR --paintings DIR --photos DIR --out DIR \
        --artist vincent-van-gogh --style vangogh --strength 0.6 --strength 0.8 --guidance 2 --guidance 4 \
        --control-scale 1 --show lighthouse.jpg

Prints deception, edge F1 and the perceptual distance to the content of every combination, as `lsast-eval` has them, and
writes `OUT/STYLE.jpg`: one picture in all combinations, strength down, guidance across, a block for each control.
Paintings that are there already are kept.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import click

import lsast
from benchmarks.bench.machine import describe
from benchmarks.quality.compare_peers import linked, paint_all, painter, score
from lsast_engines.images import find_pictures


@click.command()
@click.option("--contents", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--every", default=1, show_default=True, help="Take every n-th content.")
@click.option("--paintings", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--photos", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--artist", required=True, help="Folder of --paintings.")
@click.option("--style", required=True)
@click.option("--bundle")
@click.option("--strength", "strengths", multiple=True, type=float, required=True)
@click.option("--guidance", "guidances", multiple=True, type=float, required=True)
@click.option("--control-scale", "controls", multiple=True, type=float, required=True)
@click.option("--show", type=click.Path(exists=True, path_type=Path), help="Picture of the sheet.")
@click.option("--threads", type=int)
def main(
    contents: Path,
    every: int,
    paintings: Path,
    photos: Path,
    out: Path,
    artist: str,
    style: str,
    bundle: str | None,
    strengths: tuple[float, ...],
    guidances: tuple[float, ...],
    controls: tuple[float, ...],
    show: Path | None,
    threads: int | None,
) -> None:
    """Paint, score and show the grid."""
    chosen = linked(find_pictures(contents)[::every], out / "contents")
    grid = list(product(controls, strengths, guidances))
    names = {point: "control {:g}, strength {:g}, guidance {:g}".format(*point) for point in grid}
    folders = {names[point]: out / style / names[point].replace(", ", "_").replace(" ", "") for point in grid}
    with lsast.load(bundle, threads=threads) as stylizer:
        for point in grid:
            control, strength, guidance = point
            knobs = {"control_scale": control, "strength": strength, "guidance": guidance}
            paint_all(folders[names[point]], chosen, painter(stylizer, style=style, **knobs), names[point])
        if show:
            axes = {"guidance": guidances, "strength": strengths, "control_scale": controls}
            lsast.contact_sheet(stylizer, show, axes, style=style).image.save(out / f"{style}.jpg", quality=88)
    report = score(out / "contents", paintings, photos, artist, folders)
    metrics = ("deception", "kid", "lpips", "edge_f1")
    click.echo(f"| {style} | {' | '.join(metrics)} |\n|---|{'---|' * len(metrics)}")
    for row in report.rows:
        if row.name in folders:
            click.echo(f"| {row.name} | {' | '.join(f'{row.scores[name].value:.3f}' for name in metrics)} |")
    click.echo(f"\nn = {len(chosen)} contents; {describe(('lsast', 'onnxruntime'))}")


if __name__ == "__main__":
    main()
