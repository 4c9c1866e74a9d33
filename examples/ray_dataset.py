"""Paint a folder on many machines: a pool of Ray actors, each with an open `Stylizer`.

    pip install 'lsast[cpu,ray]'
    python examples/ray_dataset.py photos painted --actors 8 --style monet [--address auto]

IN and OUT are folders that all machines see. What is painted already is left alone, so that the same call goes on with
one that was stopped; a picture that fails costs a line, not the run. Ray spreads the pictures, restarts actors that die
and knows the machines; nothing here does.
"""

import os
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a cluster that this starts reports to Ray's maker

import ray

import lsast
from lsast.cli.inputs import plan_jobs


class Painter:
    """One actor: opens the engines once, then paints a row at a time."""

    def __init__(self, threads: int, options: dict[str, Any]) -> None:
        self._stylizer = lsast.load(threads=threads)
        self._options = options

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        """Paint `source` onto `out`; the row with what became of it."""
        try:
            result = self._stylizer.stylize(row["source"], **self._options)
            result.save(row["out"])
        except lsast.PictureError as error:
            return {**row, "seconds": 0.0, "error": str(error)}
        return {**row, "seconds": sum(result.seconds.values()), "error": ""}


@click.command()
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option("--style", default="vangogh", show_default=True)
@click.option("--size", default=512, show_default=True)
@click.option("--actors", default=1, show_default=True, help="Stylizers that paint side by side.")
@click.option("--threads", default=1, show_default=True, help="Processor cores of each.")
@click.option("--address", help="Address of a Ray cluster; none starts one on this machine.")
def main(source: str, out: str, style: str, size: int, actors: int, threads: int, address: str | None) -> None:
    """Paint the pictures under IN into the folder OUT."""
    jobs = plan_jobs([source], out + "/").jobs
    rows = [{"source": str(Path(job.source).resolve()), "out": str(Path(job.out).resolve())}
            for job in jobs if job.source and job.out and not job.out.exists()]  # fmt: skip
    if not rows:
        click.echo("nothing left to paint")
        return
    ray.init(address=address, include_dashboard=False)
    painted = (
        # A block for each picture: nobody waits for a neighbour's.
        ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Painter,
            fn_constructor_args=(threads, {"style": style, "size": size}),
            num_cpus=threads,
            compute=ray.data.ActorPoolStrategy(size=actors),
        )
    )
    failed = 0
    for row in painted.iter_rows():
        failed += bool(row["error"])
        click.echo(f"{row['source']}: {row['error']}" if row["error"] else row["out"], err=bool(row["error"]))
    click.echo(f"painted {len(rows) - failed}, failed {failed}", err=True)
    ray.shutdown()
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
