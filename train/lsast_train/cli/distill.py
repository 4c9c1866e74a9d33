"""``lsast-train distill``: options, progress and results on a terminal. Imports torch only when there is work to do."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Command, debug_option, json_option, log_to_stderr, print_result
from lsast_engines.diffusion.solvers import SOLVERS

from ..distillation.options import DistillOptions
from .shared import DISTILL_PRECISION, overwrite_option, require_train_extra, result_facts, threads_option

_DEFAULTS = {field.name: field.default for field in fields(DistillOptions)}


def _option(name: str, help_text: str, kind: Any = None) -> Any:
    """An option of `DistillOptions`, with its default."""
    shown = _DEFAULTS[name]
    return click.option(
        f"--{name.replace('_', '-')}", name, type=kind or type(shown), default=shown, show_default=True, help=help_text
    )


@click.command("distill", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--style", required=True, metavar="NAME", help="Style of the base's bundle or of a run, or its file.")
@click.option(
    "--images", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder tree of any pictures."
)
@click.option("--guidance", required=True, type=float, help="Guidance that one pass shall give.")
@click.option("--name", help="Name of the new style. [default: STYLE-gGUIDANCE]")
@click.option("--base", metavar="NAME", help="Bundle or base that the style belongs to. [default: the embedded one]")
@_option("teacher_steps", "Points of the teacher's schedule.")
@_option("strength", "Share of the schedule that the teacher runs.")
@_option("solver", "Of the teacher's runs.", click.Choice(tuple(SOLVERS)))
@_option("control_scale", "Factor of ControlNet's residuals.")
@_option("pictures", "Pictures that the teacher paints for training.")
@_option("noised", "Samples of each stage that are noised pictures.")
@_option("steps", "Optimiser steps; the stages take turns.")
@_option("batch", "Samples of a step.")
@_option("lr", "Learning rate at the start, relative to what is trained.")
@_option("size", "Side of a picture in pixels.")
@_option("mixed_precision", "Autocast of the student's pass.", DISTILL_PRECISION)
@_option("seed", "Seed of all random numbers.")
@_option("evaluate_every", "Steps between two evaluations.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder to write to. [default: runs/NAME]")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of a stopped run.")
@overwrite_option
@threads_option
@json_option
@debug_option
def distill(
    style: str,
    images: Path,
    name: str | None,
    base: str | None,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    threads: int | None,
    **chosen: Any,
) -> None:
    """Bake guidance into a style: one pass a step gives what two give.

    \b
    lsast-train distill --style vangogh --guidance 7 --images photos
    lsast-export --style vangogh-g7        # puts it where lsast-run finds it

    Prints the style file; the held-out error is drawn beside it.
    """
    options = DistillOptions(**chosen)
    require_train_extra()
    import torch

    from ..base.lazy_base import load_base, resolve_local_base
    from ..checkpoints.source import BaseSource
    from ..distillation.distillation import Distillation
    from ..distillation.source_style import find_style, read_source
    from ..paintings import PaintingDataset
    from ..training.run import RunFiles, refuse_finished

    if threads is not None:
        torch.set_num_threads(threads)
    with log_to_stderr():
        source = BaseSource(base)
        path = find_style(style, resolve_local_base(source))
        loaded = load_base(source)
        found = read_source(path, loaded)
        name = name or f"{found.name}-g{options.guidance:g}"
        folder = out or Path("runs") / name
        if not (resume or overwrite):
            refuse_finished(RunFiles(folder, name, prompts=False))
        pictures = PaintingDataset.load(images, options.size, "random", loaded.config.size)
        result = Distillation(loaded, found, pictures, options, name, folder, resume).run()
    print_result(result_facts(result), result.file)
