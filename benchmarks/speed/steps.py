"""How few steps do: each solver with few steps against a run of many, of the same seed.

    python -m benchmarks.speed.steps PICTURE... [--style vangogh] [--size 512] [--steps 4 --steps 6 …] [--json]

Prints a Markdown table of the latent's distance to that of the reference (root of the mean squared difference, as a
share of the reference's own deviation) and of the picture's PSNR to it; means over pictures and styles. The reference
is the bundle's own solver with `--reference` steps. A schedule of N steps runs the last int(N * strength).
"""

import json
import statistics
from pathlib import Path
from typing import Any

import click
import numpy as np

import lsast
from benchmarks.bench.machine import describe
from benchmarks.speed.options import pixels
from lsast.video.optical_flow import TemporalState
from lsast_engines.cli import finite_json
from lsast_engines.images import psnr


class Recorder(TemporalState):
    """Leads nothing and keeps the latent of the last painting, [4, h, w]."""

    latent: Any = None

    def blend(self, latent: Any, painted: Any) -> Any:
        """See `TemporalState.blend`: the canvas as it is."""
        self.latent = latent.copy()
        return painted


def painted(stylizer: lsast.Stylizer, picture: Path, given: dict[str, Any]) -> tuple[lsast.Result, Any]:
    """A painting and its latent."""
    recorder = Recorder()
    (result,) = stylizer.stylize_frames([picture], temporal=recorder, **given)
    return result, recorder.latent


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--style", "styles", multiple=True, default=("vangogh", "monet"), show_default=True)
@click.option("--bundle", help="Folder or name of a bundle. [default: mini]")
@click.option("--backend", default="auto", show_default=True)
@click.option("--threads", type=int, help="[default: the backend's choice]")
@click.option("--size", default=512, show_default=True)
@click.option("--solver", "solvers", multiple=True, default=("ddim", "dpmpp2m", "unipc"), show_default=True)
@click.option("--steps", "counts", multiple=True, type=int, default=(4, 6, 8, 10, 12, 20, 35), show_default=True)
@click.option("--reference", default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    pictures: tuple[Path, ...],
    styles: tuple[str, ...],
    bundle: str | None,
    backend: str,
    threads: int | None,
    size: int,
    solvers: tuple[str, ...],
    counts: tuple[int, ...],
    reference: int,
    as_json: bool,
) -> None:
    """Compare one solver after another."""
    jobs = [{"picture": picture, "style": style} for picture in pictures for style in styles]
    rows: list[dict[str, Any]] = []
    with lsast.load(bundle, backend, threads=threads) as stylizer:

        def run(job: dict[str, Any], **options: Any) -> tuple[lsast.Result, Any]:
            return painted(stylizer, job["picture"], {"style": job["style"], "size": size, **options})

        own = stylizer.bundle.manifest.defaults["solver"]
        references = [run(job, steps=reference, solver=own) for job in jobs]
        for solver in solvers:
            for steps in counts:
                distances, decibels = [], []
                for job, (best, latent) in zip(jobs, references, strict=True):
                    result, found = run(job, steps=steps, solver=solver)
                    distances.append(float(np.sqrt(((found - latent) ** 2).mean()) / latent.std()))
                    decibels.append(psnr(pixels(result), pixels(best)))
                rows.append(
                    {
                        "solver": solver,
                        "steps": steps,
                        "latent": statistics.fmean(distances),
                        "psnr": statistics.fmean(decibels),
                    }
                )
        facts = {
            **describe(("lsast", "numpy", "onnxruntime", "openvino")),
            "bundle": stylizer.bundle.manifest.name,
            "backend": stylizer.backend,
            "threads": "the backend's choice" if threads is None else str(threads),
        }
    if as_json:
        told = {"machine": facts, "reference": [own, reference], "size": size, "styles": styles}
        print(json.dumps(finite_json({**told, "pictures": len(pictures), "rows": rows}), indent=1))
        return
    print(f"{size}² pixels, {len(pictures)} pictures in {', '.join(styles)}, against {own} with {reference}\n{facts}\n")
    print("| solver | " + " | ".join(f"{steps} steps" for steps in counts) + " |")
    print("|---" * (1 + len(counts)) + "|")
    for solver in solvers:
        cells = [f"{row['latent']:.3f} / {row['psnr']:.1f}" for row in rows if row["solver"] == solver]
        print(f"| {solver} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
