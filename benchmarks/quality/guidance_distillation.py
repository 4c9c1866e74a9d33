"""How near a style with distilled guidance comes to guidance, in one pass a step instead of two.

    pip install -c constraints.txt '.[cpu,train,export,eval]'
    for g in 3 5 7.5 10; do
        lsast-train distill --style vangogh --guidance $g --images PHOTOS && lsast-export --style vangogh-g$g
    done
    python -m benchmarks.quality.guidance_distillation --contents DIR --out DIR \
        --student vangogh-g3 --student vangogh-g5 --student vangogh-g7.5 --student vangogh-g10 \
        --paintings DIR --photos DIR --artist vincent-van-gogh

Every content is painted with the same seed by the original style with guidance (the teacher), by the student, and by
the original in one pass (the yardstick: what is had for the same time without distilling), and by every style of
`--beside`.

Prints the PSNR of each to the teacher, of pictures (peak 255) and of the latents that the decoder is handed (peak: the
range of the teacher's), mean and lowest over the contents, and median seconds of denoising; with `--paintings` and
`--photos` also what `lsast-eval` says. Writes `guidance_baked.json`, all paintings, and a sheet of every content. What
is painted already under `--out` is kept with its latent and its seconds, so that a stopped run goes on: take another
folder for other options. The contents must be none that the student was distilled on.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import lsast
from benchmarks.bench.machine import describe
from benchmarks.quality.compare_peers import linked, score
from lsast.video.optical_flow import TemporalState
from lsast_engines.cli import finite_json
from lsast_engines.errors import UsageError
from lsast_engines.files import replace_file
from lsast_engines.images import find_pictures, psnr

CELL = 320


@dataclass
class Way:
    """One way to paint, beside the teacher's."""

    name: str
    picture: list[float] = field(default_factory=list)
    latent: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self) -> str:
        """Of the table."""
        if not self.picture:
            return f"| {self.name} | | | {statistics.median(self.seconds):.2f} |"
        parts = [f"{statistics.mean(side):.1f} ({min(side):.1f})" for side in (self.picture, self.latent)]
        return f"| {self.name} | {' | '.join(parts)} | {statistics.median(self.seconds):.2f} |"


def paint(stylizer: lsast.Stylizer, picture: Path, options: dict[str, Any]) -> tuple[Image.Image, np.ndarray, float]:
    """A painting, the latent that was decoded to it, and the seconds of denoising."""
    latents: list[np.ndarray] = []

    class Recorder(TemporalState):
        def blend(self, latent: Any, painted: Any) -> Any:
            latents.append(latent.copy())
            return painted

    (result,) = stylizer.stylize_frames([picture], temporal=Recorder(), **options)
    return result.image.convert("RGB"), latents[0][None], result.seconds["denoise"]


def kept(
    stylizer: lsast.Stylizer, picture: Path, options: dict[str, Any], folder: Path
) -> tuple[Image.Image, np.ndarray, float]:
    """What `paint` gives, from `folder` if it is there."""
    painting, facts = folder / f"{picture.stem}.png", folder / "latents" / f"{picture.stem}.npz"
    if not (painting.exists() and facts.exists()):
        image, latent, seconds = paint(stylizer, picture, options)
        facts.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(facts) as handle:
            np.savez(handle, latent=latent, seconds=seconds)
        with replace_file(painting) as handle:
            image.save(handle, "PNG")
    with Image.open(painting) as opened, np.load(facts) as arrays:
        return opened.convert("RGB"), arrays["latent"], float(arrays["seconds"])


def sheet(content: Image.Image, painted: dict[str, Image.Image]) -> Image.Image:
    """Content and paintings side by side, each under its name."""
    cells = {"content": content, **painted}
    height = round(CELL * content.height / content.width)
    page = Image.new("RGB", (CELL * len(cells), height + 18), "white")
    for index, (name, image) in enumerate(cells.items()):
        ImageDraw.Draw(page).text((index * CELL + 4, 3), name, fill="black")
        page.paste(image.convert("RGB").resize((CELL - 4, height), Image.Resampling.LANCZOS), (index * CELL + 2, 18))
    return page


def planned(stylizer: lsast.Stylizer, name: str, beside: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name and options of every way to paint beside the student `name`.

    Raises:
        UsageError: its guidance is not distilled.
    """
    style = stylizer.bundle.open_style(name)
    if style.distilled_guidance is None:
        raise UsageError(f"found {name!r}, whose guidance is not distilled; expected a style of lsast-train distill")
    original = style.meta["distilled_from"]
    return {
        "teacher": {"style": original, "guidance": style.distilled_guidance},
        "student": {"style": name},
        "one pass": {"style": original, "guidance": 1.0},
        **{other: {"style": other} for other in beside},
    }


@click.command()
@click.option("--contents", required=True, type=click.Path(exists=True, path_type=Path), help="Folder of pictures.")
@click.option("--every", default=1, show_default=True, help="Take every n-th content.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option(
    "--student", "students", multiple=True, required=True, help="A style with distilled guidance; repeatable."
)
@click.option("--beside", multiple=True, help="Another distilled style to show beside the student; repeatable.")
@click.option("--bundle")
@click.option("--backend", default="auto")
@click.option("--threads", type=int)
@click.option("--size", type=int)
@click.option("--seed", default=0, show_default=True)
@click.option("--paintings", type=click.Path(exists=True, path_type=Path), help="For lsast-eval: a folder an artist.")
@click.option("--photos", type=click.Path(exists=True, path_type=Path), help="For lsast-eval.")
@click.option("--artist", help="Folder of --paintings.")
def main(
    contents: Path,
    every: int,
    out: Path,
    students: tuple[str, ...],
    beside: tuple[str, ...],
    bundle: str | None,
    backend: str,
    threads: int | None,
    size: int | None,
    seed: int,
    paintings: Path | None,
    photos: Path | None,
    artist: str | None,
) -> None:
    """Paint, compare, print."""
    chosen = linked(find_pictures(contents)[::every], out / "contents")
    machine = describe(("lsast", "numpy", "onnxruntime", "openvino"))
    report: dict[str, Any] = {"machine": machine, "contents": len(chosen), "students": {}}
    with lsast.load(bundle, backend, threads=threads) as stylizer:
        report["backend"] = stylizer.backend
        for name in students:
            plan = planned(stylizer, name, beside)
            style = stylizer.bundle.open_style(name)
            table = {way: Way(way) for way in plan}
            # One pass of the original is the same for all students.
            folders = {
                way: (out if way == "one pass" else out / name) / way.replace(" ", "_").replace(",", "") for way in plan
            }
            for path in tqdm(chosen, desc=name, unit="picture"):
                painted: dict[str, Image.Image] = {}
                expected: dict[str, np.ndarray] = {}
                for way, options in plan.items():
                    image, latent, seconds = kept(stylizer, path, {**options, "size": size, "seed": seed}, folders[way])
                    table[way].seconds.append(seconds)
                    if way == "teacher":
                        expected = {"picture": np.asarray(image), "latent": latent}
                    else:
                        peak = float(expected["latent"].max() - expected["latent"].min())
                        table[way].picture.append(psnr(np.asarray(image), expected["picture"], 255))
                        table[way].latent.append(psnr(latent, expected["latent"], peak))
                    painted[way] = image
                with Image.open(path) as content:
                    sheet(content, painted).save(out / name / f"{path.stem}.sheet.png")
            told: dict[str, Any] = {
                "guidance": style.distilled_guidance,
                "relative_error": style.meta.get("distill_relative_error"),
                "ways": [asdict(way) for way in table.values()],
            }
            click.echo(f"\n{name}: guidance {style.distilled_guidance:g}, PSNR to the teacher, mean (lowest), dB\n")
            click.echo("| | picture | latent | denoising, s |\n|---|---|---|---|")
            click.echo("\n".join(way.row() for way in table.values()))
            if paintings and photos and artist:
                rows = score(out / "contents", paintings, photos, artist, folders).rows
                told["scores"] = {
                    row.name: {name: found.value for name, found in row.scores.items()}
                    for row in rows
                    if row.name in folders
                }
                metrics = list(next(iter(told["scores"].values())))
                click.echo(f"\n| | {' | '.join(metrics)} |\n|---|{'---|' * len(metrics)}")
                for way, found in told["scores"].items():
                    click.echo(f"| {way} | {' | '.join(f'{found[metric]:.3f}' for metric in metrics)} |")
            report["students"][name] = told
    (out / "guidance_baked.json").write_text(json.dumps(finite_json(report), indent=1))
    click.echo(f"\nn = {len(chosen)} contents, {report['backend']}; {machine}")


if __name__ == "__main__":
    main()
