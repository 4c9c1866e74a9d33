"""``lsast-train``: options, progress and results on a terminal. Imports torch only when there is work to do."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Group, log_to_stderr
from lsast_engines.errors import TrainingError, UsageError
from lsast_engines.images import require_folder

from ..artists import artists_of, pictures_by, style_name
from ..options import PRESETS, TrainOptions
from ..training.run import InterruptionError, RunFiles, find_device
from .shared import (
    EXTRA,
    declared_options,
    folder_option,
    import_options,
    out_option,
    print_run,
    run_options,
    set_up_torch,
    take_source,
)
from .tuning import distill, finetune

log = logging.getLogger("lsast.train")


SECTIONS = {
    "What to learn": ("style", "images", "artist", "each_artist", "licence", "out", "resume", "overwrite"),
    "Base": ("base", "controlnet", "vae", "unet_weights", "revision"),
    "Prompts": ("preset", "variant", "generator", "prompt", "placeholder_tokens", "layout", "gradient"),
    "Training": (
        "steps", "batch", "gradient_accumulation", "views", "lr", "size", "crop", "weighting", "mixed_precision",
        "gradient_checkpointing", "seed", "device", "threads",
    ),
}  # fmt: skip
"""Sections of the help and their options."""


@click.group("lsast-train", cls=Group, invoke_without_command=True, sections=SECTIONS, requires=EXTRA)
@click.option("-s", "--style", metavar="NAME", help="Name of the style to learn. [default with --artist: the artist's]")
@folder_option("--images", text="Folder tree of the artist's pictures.")
@click.option("--artist", metavar="NAME", help="Only this artist's pictures of a collection such as WikiArt.")
@click.option("--each-artist", is_flag=True, help="A style of each artist of a collection, one after the other.")
@click.option(
    "--base",
    metavar="NAME",
    help="Base to learn it on: a bundle's name or folder, a folder in diffusers' format, a file in CompVis naming, or "
    "OWNER/NAME of the hub. [default: the embedded one]",
)
@import_options()
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), default="quick", show_default=True, help="Sets all that is not given."
)
@declared_options(TrainOptions, PRESETS["quick"])
@click.option("--licence", metavar="TEXT", default="", help="Licence of the pictures, kept in the prompt file.")
@out_option
@run_options
@click.pass_context
def command(
    context: click.Context,
    /,
    style: str | None,
    images: Path | None,
    artist: str | None,
    each_artist: bool,
    preset: str,
    licence: str,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    device: str | None,
    threads: int | None,
    **chosen: Any,
) -> None:
    """Learn an artist's prompts from a folder of pictures.

    \b
      lsast-train --style vangogh --images paintings/van-gogh
      lsast-train --images wikiart/Impressionism --artist "Claude Monet"
      accelerate launch -m lsast_train --style vangogh --images paintings/van-gogh --preset paper --base sd15

    Prints the prompt file, which `lsast-export --style NAME` turns into a style; the held-out loss is drawn beside it.
    """
    if context.invoked_subcommand is not None:
        return
    if each_artist and (style or artist):
        raise UsageError(
            "found --each-artist with --style or --artist; expected it alone: styles are named after artists"
        )
    style = style_name(artist) if artist and style is None else style
    named = style is not None or each_artist
    missing = [name for name, there in (("--style NAME", named), ("--images DIR", images is not None)) if not there]
    if images is None or not named:
        raise UsageError(f"found no {' and no '.join(missing)}; lsast-train needs both (--help lists all options)")
    source = take_source(chosen)
    options = replace(PRESETS[preset], **{name: value for name, value in chosen.items() if value is not None})
    require_folder(images)  # before torch is imported, which takes seconds
    pictures: Mapping[str, Sequence[Path] | None]
    if each_artist:
        pictures = artists_of(images)
    else:
        pictures = {str(style): None if artist is None else pictures_by(artist, images)}
    files = {
        name: RunFiles(Path("runs", name) if out is None else out / name if each_artist else out, name)
        for name in pictures
    }
    if len(pictures) == 1:
        # Before the base is loaded, whose multiple `Inversion` checks.
        files[next(iter(pictures))].require(options.size, 1, resume, overwrite)

    from accelerate import Accelerator

    from ..base.lazy_base import load_base
    from ..checkpoints.source import BaseSource
    from ..inversion import Inversion
    from ..paintings import PaintingDataset

    set_up_torch(threads)
    accelerator = Accelerator()
    main = accelerator.is_main_process
    failed = []
    with log_to_stderr(logging.INFO if main else logging.ERROR):
        base = load_base(BaseSource(**source))
        base.round_unet(options.mixed_precision, find_device(device))
        # Of several styles, finished ones are passed over, and one that fails ends no other.
        for name, paths in pictures.items():
            if len(pictures) > 1 and files[name].result.exists() and not overwrite:
                log.info("%s: finished before, passed over", name)
                continue
            goes_on = files[name].checkpoint.exists() if resume and len(pictures) > 1 else resume
            trains = False
            try:
                with files[name].reserved(options.size, 1, goes_on, overwrite, main):
                    trains = True
                    paintings = PaintingDataset.load(images, options.size, options.crop, base.config.size, main, paths)
                    run = Inversion(base, paintings, options, name, files[name].folder, licence, goes_on, device)
                    result = run.run()
            except TrainingError as error:
                # Of several processes only the main one meets another run; the others would go on with the artist.
                refused = accelerator.num_processes > 1 and not trains
                if len(pictures) == 1 or isinstance(error, InterruptionError) or refused:
                    raise
                log.error("%s: %s", name, error)
                failed.append(name)
                continue
            if main:
                print_run(result)
    if failed:
        raise TrainingError(f"found no style for {len(failed)} of {len(pictures)} artists: {', '.join(failed)}")


for _other in (distill, finetune):
    command.add_command(_other)
