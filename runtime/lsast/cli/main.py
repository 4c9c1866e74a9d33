"""`lsast-run`: repaint pictures from the command line.

Output paths, or with `--json` one JSON object each, go to stdout; progress and errors go to stderr, one line per fault.
Exit status: 0 done, 1 something failed, 2 wrong usage, 130 interrupted. Numpy and the engines are imported only when a
picture is to be painted, so that `--help` and `--version` answer at once.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lsast_engines.cli import USAGE, Command, debug_option, echo, fail, json_option, log_to_stderr, print_result, quiet
from lsast_engines.errors import LsastError

from ..options.options import rules

SECTIONS = {
    "Painting": (*rules(), "mask"),
    "Bundle and backend": ("bundle", "backend", "device", "threads", "compute_dtype", "max_megapixels", "build"),
    "Several paintings": ("overwrite", "watch", "axes", "origin"),
}


def complete_style(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The mixes that a shell may complete: the last style of `incomplete` is begun."""
    from lsast_engines.bundle.bundle import Bundle, find_bundle

    before, plus, begun = incomplete.rpartition("+")
    with contextlib.suppress(LsastError):
        styles = Bundle.open(find_bundle(ctx.params.get("bundle")), verify_hashes=False).styles()
        return [f"{before}{plus}{name}" for name in styles if name.startswith(begun)]
    return []


def _complete_choice(choices: tuple[Any, ...], _: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in choices if name.startswith(incomplete)]


def painting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for each field of `Options`; what is not given is None."""
    metavars, short = {"style": "MIX", "size": "SIZE", "tile": "TILE"}, {"style": ("-s",)}
    for name, rule in reversed([*rules().items()]):
        flag = f"--{name.replace('_', '-')}"
        if rule.type is bool:
            add = click.option(flag, is_flag=True, default=None, help=rule.help)
        else:
            default = "" if rule.default is None else f"; default: {rule.default}"
            text = f"{rule.help} [{rule.values}{default}]" if rule.range or rule.choices else rule.help
            metavar = metavars.get(name) or {int: "N", float: "NUMBER", str: "NAME"}[rule.type]
            complete = complete_style if name == "style" else functools.partial(_complete_choice, rule.choices)
            names = (*short.get(name, ()), flag)
            add = click.option(*names, type=rule.type, metavar=metavar, help=text, shell_complete=complete)
        command = add(command)
    return command


@click.command(
    "lsast-run",
    cls=Command,
    sections=SECTIONS,
    epilog="A painting option that is not given is taken from the preset, else from the style, else from the bundle.",
)
@click.argument("paths", metavar="IN... [OUT]", nargs=-1, type=click.Path())
@painting_options
@click.option("-o", "--out", metavar="PATH", help="OUT, where it is not the last argument; then all others are IN.")
@click.option(
    "-m",
    "--mask",
    metavar="PATH",
    type=click.Path(),
    help="Picture of the size of IN that says where to paint: white is painted, black stays as it is.",
)
@click.option("--bundle", metavar="PATH", help="Folder or name of the bundle. [default: $LSAST_BUNDLE, else mini]")
@click.option(
    "--backend",
    metavar="NAME",
    default="auto",
    help="Library that runs the networks: onnxruntime, openvino, tensorrt-rtx or tensorrt. [default: auto, the fastest "
    "on this processor; --doctor says which]",
)
@click.option("--device", metavar="NAME", default="auto", help="Device of the backend, such as cpu or cuda. "
              "[default: auto]")  # fmt: skip
@click.option("--threads", type=int, metavar="N", help="Processor threads to use. [default: the backend's choice]")
@click.option(
    "--compute-dtype",
    metavar="TYPE",
    default="auto",
    help="Data type (dtype) of the computation: fp32; with openvino also bf16 and fp16, on GPUs also fp16. "
    "[default: auto, bf16 where the processor has it, else fp32; on GPUs fp16]",
)
@click.option(
    "--max-megapixels",
    type=float,
    metavar="NUMBER",
    help="Refuse larger pictures before they are decoded. [default: 850 MB decoded, 121 megapixels of RGB]",
)
@click.option("--build", is_flag=True, help="First compile the engines that tensorrt-rtx or tensorrt lacks (minutes).")
@click.option("--overwrite", is_flag=True, help="With several pictures: paint those again whose painting exists.")
@click.option("--watch", is_flag=True, help="Keep painting pictures that are added to the folders IN, until Ctrl-C.")
@click.option(
    "--grid",
    "axes",
    metavar="OPTION=A,B",
    multiple=True,
    help="Write one sheet with a painting for every value of an option; repeat it to combine options.",
)
@click.option("--from", "origin", metavar="PAINTING", help="Repeat a painting with what its file says, see above.")
@click.option("--list-styles", is_flag=True, help="Print the styles of the bundle and exit.")
@click.option(
    "--cache",
    type=click.Choice(["list", "prune", "clear"]),
    help="List what is cached and exit; prune removes what was made of bundles that are gone or "
    "changed, clear everything.",
)
@click.option("--doctor", is_flag=True, help="Print what works on this machine and what to install, and exit.")
@json_option
@debug_option
def main(
    paths: tuple[str, ...],
    out: str | None,
    axes: tuple[str, ...],
    origin: str | None,
    overwrite: bool,
    watch: bool,
    list_styles: bool,
    cache: str | None,
    doctor: bool,
    **options: Any,
) -> None:
    """Repaint the picture IN in the style of an artist, and write it to OUT: PNG, JPEG, WebP, AVIF or TIFF.

    \b
      lsast-run photo.jpg painting.png --style monet
      lsast-run photos/*.jpg -o paintings/ -s vangogh:0.6+monet:0.4 --preset fast
      lsast-run photo.jpg sheet.png --grid strength=0.4,0.6,0.8 --grid style=vangogh,monet

    Without OUT the painting stands beside IN: photo-painted.jpg.

    The painting has the size, the colour profile and (except in JPEG) the transparency of IN. OUT is written whole or
    not at all; a file of that name is replaced.

    Several pictures: IN may be files, folders (with all folders inside) and quoted patterns such as 'photos/**/*.jpg';
    OUT is then a folder. Paintings that exist are skipped, so that the same call continues one that was stopped. A
    picture that fails does not stop the others and is listed at the end. Videos and animated
    GIF, WebP and PNG become videos or animations. The name - stands for standard input or standard output (PNG).

    --from PAINTING checks that the bundle and the styles that PAINTING was made with are here. With IN it also checks
    the picture, paints it again and compares the two; with IN and OUT it writes the painting instead. Options that are
    given besides replace those of PAINTING, and nothing is checked.
    """
    if doctor or cache is not None or list_styles:
        from . import commands

        invoke = click.get_current_context().invoke
        if doctor:
            invoke(commands.doctor)
        elif cache is not None:
            invoke(commands.cache, action=cache)
        else:
            invoke(commands.styles, bundle=options["bundle"])
        return
    if (origin is not None) + bool(axes) + watch > 1:
        fail("found more than one of --from, --grid and --watch; expected one", USAGE)
    if not paths and origin is None:
        fail("found no IN; expected: lsast-run IN OUT (--help lists all options)", USAGE)
    sources = paths if out is not None or len(paths) == 1 else paths[:-1]
    if axes and len(sources) > 1:
        fail("found --grid and several pictures; expected: lsast-run IN OUT --grid OPTION=A,B", USAGE)
    where = {name: options.pop(name) for name in SECTIONS["Bundle and backend"]}
    options = {name: value for name, value in options.items() if value is not None}
    from . import run
    from .inputs import Job, default_output, plan_jobs

    with log_to_stderr(logging.WARNING):
        if origin is not None:
            from .repeat import repeat

            source_of = click.get_current_context().get_parameter_source
            given = {name: value for name, value in where.items() if source_of(name) is not ParameterSource.DEFAULT}
            files = [Path(path) for path in (*paths, *filter(None, [out]))]
            print_result(*repeat(Path(origin), files, given, options))
            return
        if "mask" in options:  # read once for all pictures, and before them
            from lsast_engines.images import read_picture

            options["mask"] = read_picture(options["mask"], where["max_megapixels"])
        out = out or (paths[-1] if len(paths) > 1 else default_output(paths[0]))
        if axes:
            run.paint_sheet(Job(Path(sources[0]), Path(out)), axes, where, options)
        elif watch:
            run.paint_watched(sources, out, where, options, overwrite)
        elif (plan := plan_jobs(sources, out)).single:
            run.paint_one(plan.jobs[0], where, options)
        else:
            if plan.left_out and not quiet():
                echo(f"left out, by their suffixes no pictures: {plan.left_out}", err=True)
            run.paint_several(plan.jobs, plan.failures, where, options, overwrite)
