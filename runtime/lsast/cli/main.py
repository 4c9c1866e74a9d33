"""`lsast-run`: repaint pictures from the command line.

Output paths, or with `--json` one JSON object each, go to stdout; progress and errors go to stderr, a line for each
fault. Exit status: 0 done, 1 something failed, 2 wrong usage, 130 interrupted. Numpy and the engines are imported only
when a picture is to be painted, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lsast_engines.cli import USAGE, Command, debug_option, fail

from .. import __version__
from ..options.removed import REMOVED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .inputs import Job


def _number_or_text(ctx: click.Context, param: click.Parameter, value: str | None) -> float | str | None:
    """A number, or a text that the library refuses and says why."""
    try:
        return value if value is None else float(value)
    except ValueError:
        return value


def _refuse(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Say what to do instead of an option that was removed."""
    if value is not None and param.name is not None:
        raise click.UsageError(f"{param.opts[0]} was removed: {REMOVED[param.name][1]}")


def _removed_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Hidden options of the names in `REMOVED`."""
    for name in REMOVED:
        option = click.option(f"--{name.replace('_', '-')}", hidden=True, expose_value=False, callback=_refuse)
        command = option(command)
    return command


@click.command(
    "lsast-run",
    cls=Command,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog="Options that are not given are the preset's, else the style's defaults, else the bundle's.",
)
@click.argument("paths", metavar="IN... OUT", nargs=-1, type=click.Path())
@click.option(
    "--style", metavar="MIX", help="Whose hand to paint with: vangogh, or vangogh:0.6+monet:0.4, vangogh@up+monet@0-4."
)
@click.option(
    "--preset",
    metavar="NAME",
    help="exact, balanced or fast; released paints as LSAST's code does. Options given besides go first.",
)
@click.option("--bundle", metavar="PATH", help="Folder or name of a bundle. [default: $LSAST_BUNDLE, else mini]")
@click.option("--steps", type=int, help="Length of the full schedule, of which the last int(steps * strength) run.")
@click.option(
    "--strength",
    metavar="NUMBER",
    callback=_number_or_text,
    help="How far to go from the picture: above 0, up to 1.",
)
@click.option("--guidance", type=float, help="How much to exaggerate the style: 1 is plain, and the quickest.")
@click.option("--control", type=float, help="How firmly the picture's edges hold: 0 to 2.")
@click.option("--size", type=int, help="Paint at about SIZE x SIZE pixels; 0 is the picture's own size.")
@click.option("--fit", metavar="WAY", help="aspect keeps the picture's; squash gives SIZE x SIZE. [default: aspect]")
@click.option("--tile", type=int, help="Paint large pictures in tiles of TILE x TILE; 0 never does. [default: 1024]")
@click.option("--solver", metavar="NAME", help="ddim, dpmpp2m, unipc, or released: ddim on the released code's steps.")
@click.option("--cache-interval", type=int, metavar="N", help="Compute the whole U-Net at every N-th step only.")
@click.option("--decoder", metavar="WHICH", help="full, or small: quicker, if the bundle has one. [default: full]")
@click.option("--seed", type=int, help="Seed of the noise; the same seed gives the same bytes. [default: 0]")
@click.option("--alpha", metavar="WAY", help="Transparency: keep, or composite on white. [default: keep]")
@click.option("--mask", metavar="PATH", type=click.Path(), help="Where to paint: white; black stays as it is.")
@click.option("--feather", type=int, help="Pixels over which the painting fades in inside the mask. [default: 16]")
@click.option("--keep-colour", is_flag=True, default=None, help="Keep the picture's colours; only luma is painted.")
@click.option(
    "--backend", metavar="NAME", default="auto", help="onnxruntime, openvino, tensorrt-rtx, tensorrt. [default: auto]"
)
@click.option("--device", metavar="NAME", default="auto", help="cpu, cuda ... [default: auto]")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with. [default: the backend's choice]")
@click.option(
    "--compute-dtype",
    "--arithmetic",
    "compute_dtype",
    metavar="TYPE",
    default="fp32",
    help="fp32; openvino also bf16, fp16; tensorrt also fp16. [default: fp32]",
)
@click.option("--build", is_flag=True, help="Compile what tensorrt-rtx or tensorrt misses; takes minutes.")
@click.option(
    "--grid",
    "axes",
    metavar="NAME=A,B",
    multiple=True,
    help="Paint a contact sheet over values of an option; up to three times.",
)
@click.option("--from", "origin", metavar="PAINTING", help="Repeat a painting from what its file says; see below.")
@click.option("--overwrite", is_flag=True, help="Of several: paint also what is there already.")
@click.option("--watch", is_flag=True, help="Go on painting what arrives or changes in the folders IN, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a file instead of the output's path.")
@click.option("--list-styles", is_flag=True, help="Print the styles of the bundle and exit.")
@click.option("--doctor", is_flag=True, help="Print what works on this machine and what to install, and exit.")
@debug_option
@_removed_options
@click.version_option(__version__, "-V", "--version", message="lsast %(version)s")
def main(
    paths: tuple[str, ...],
    bundle: str | None,
    backend: str,
    device: str,
    threads: int | None,
    compute_dtype: str,
    build: bool,
    axes: tuple[str, ...],
    origin: str | None,
    overwrite: bool,
    watch: bool,
    as_json: bool,
    list_styles: bool,
    doctor: bool,
    **options: Any,
) -> None:
    """Repaint the picture IN in a learned artist's hand and write it to OUT, a PNG, JPEG or WebP by its suffix.

    OUT keeps the size, the colour profile and (but for JPEG) the transparency of IN. It is written whole or not at
    all, over any file of that name, also over IN itself.

    Of several INs (files, folders, which are mirrored, or 'quoted/**/*.jpg') OUT is a folder. Paintings that are there
    are skipped, so that the same call goes on with one that was stopped; a file that fails is told at the end, and the
    rest is done. - is standard input or output (a PNG). Videos (avi, m4v, mkv, mov, mp4, webm) become videos.

    --from PAINTING verifies that the bundle and the styles of a painting are here; with IN also that picture, which it
    paints again and compares; with OUT it writes that. Options given besides change it, and nothing is verified.

    --grid strength=0.4,0.6 --grid control=0.5,1 --grid style=vangogh,monet writes one sheet with all eight to OUT.
    """
    if doctor:
        from .doctor import examine

        found = examine()
        click.echo(json.dumps({**asdict(found), "healthy": found.healthy}) if as_json else found.text())
        raise click.exceptions.Exit(0 if found.healthy else 1)
    if list_styles:
        from lsast_engines.bundle.bundle import Bundle, find_bundle
        from lsast_engines.bundle.style import StyleFile

        styles = Bundle.open(find_bundle(bundle)).styles()
        baked = {name: scale for name, path in styles.items() if (scale := StyleFile(path).distilled_guidance)}
        told = {"styles": list(styles), "guidance_baked": baked}
        click.echo(json.dumps(told) if as_json else "\n".join(styles))
        return
    if (origin is not None) + bool(axes) + watch > 1:
        fail("found more than one of --from, --grid and --watch; expected one", USAGE)
    if axes and len(paths) > 2:
        fail("found --grid and several pictures; expected: lsast-run IN OUT --grid NAME=A,B", USAGE)
    if len(paths) < 2 and origin is None:
        fail("found no IN and OUT; expected: lsast-run IN OUT (--help lists all options)", USAGE)
    from .inputs import plan_jobs

    where = {
        "bundle": bundle,
        "backend": backend,
        "device": device,
        "threads": threads,
        "compute_dtype": compute_dtype,
        "build": build,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if origin is not None:
        _repeat(origin, paths, where, options, as_json)
    elif axes:
        from .commands import sheet

        report, line = sheet(Path(paths[0]), Path(paths[-1]), axes, where, options)
        click.echo(json.dumps(report) if as_json else line)
    elif watch:
        _watch(paths, where, options, overwrite, as_json)
    elif (plan := plan_jobs(paths[:-1], paths[-1])).single:
        _paint_one(plan.jobs[0], where, options, as_json)
    else:
        _paint_several(plan.jobs, len(plan.jobs), where, options, overwrite, as_json)


def _repeat(origin: str, paths: tuple[str, ...], where: dict[str, Any], options: dict[str, Any], as_json: bool) -> None:
    """Verify and repeat a painting."""
    from .commands import repeat

    chosen = click.get_current_context().get_parameter_source
    given = {name: value for name, value in where.items() if chosen(name) is not ParameterSource.DEFAULT}
    report, line = repeat(Path(origin), [Path(path) for path in paths], given, options)
    click.echo(json.dumps(report) if as_json else line)


def _paint_one(job: Job, where: dict[str, Any], options: dict[str, Any], as_json: bool) -> None:
    """Paint and save one picture, with a progress bar on stderr where that is a terminal."""
    from ..stylizer import load
    from .run import ProgressBars, check, paint

    check(job)
    if as_json and job.out is None:
        fail("found --json and OUT -; expected the name of a file: both would go to standard output", USAGE)
    begin = time.perf_counter()
    with contextlib.closing(ProgressBars(1)) as bars, load(**where, preset=options.get("preset")) as stylizer:
        opened = time.perf_counter()
        report = {"out": str(job.out), **paint(job, stylizer, options, bars)}
    report["seconds"] = {"open": opened - begin, **report["seconds"]}
    if job.out is not None:
        click.echo(json.dumps(report) if as_json else report["out"])


def _watch(
    paths: tuple[str, ...], where: dict[str, Any], options: dict[str, Any], overwrite: bool, as_json: bool
) -> None:
    """Paint what is in folders and what comes, until the keyboard interrupts."""
    from .watch import check_watch, watch

    check_watch(paths[:-1], paths[-1])
    click.echo(f"watching {', '.join(paths[:-1])}; Ctrl-C ends", err=True)
    jobs = watch(paths[:-1], paths[-1], overwrite=overwrite)
    _paint_several(jobs, None, where, options, True, as_json)


def _paint_several(
    jobs: Iterable[Job],
    count: int | None,
    where: dict[str, Any],
    options: dict[str, Any],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Paint one job after another, report each on stdout and sum up on stderr.

    Of folders that are watched there are nobody knows how many, `count` is None, and an interrupt is the way to end.
    """
    from ..stylizer import load
    from .run import ProgressBars, RunSummary, paint_all

    tally = RunSummary()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: click.echo(tally.summary(), err=True))
        bars = stack.enter_context(contextlib.closing(ProgressBars(count)))

        def report(facts: dict[str, Any]) -> None:
            if as_json or facts["status"] == "painted":
                with bars.paused():
                    click.echo(json.dumps(facts) if as_json else facts["out"])

        stylizer = functools.cache(lambda: stack.enter_context(load(**where, preset=options.get("preset"))))
        with contextlib.suppress(KeyboardInterrupt) if count is None else contextlib.nullcontext():
            paint_all(jobs, stylizer, options, overwrite=overwrite, bars=bars, report=report, tally=tally)
    if tally.failures:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
