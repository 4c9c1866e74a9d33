"""``lsast-train finetune``: options, progress and results on a terminal. Imports torch only when it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Command, log_to_stderr, print_result

from ..finetuning.options import FinetuneOptions
from .shared import (
    EXTRA,
    contents_option,
    declared_options,
    import_options,
    out_option,
    result_facts,
    run_options,
    set_up_torch,
)


@click.command("finetune", cls=Command, requires=EXTRA)
@click.option(
    "-s", "--style", required=True, metavar="NAME", help="Prompts of a run or of the base's bundle, or a file."
)
@click.option(
    "--images",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder tree of the artist's pictures.",
)
@contents_option
@click.option("--name", help="Name of the new style. [default: STYLE]")
@click.option("--base", metavar="NAME", help="Bundle or base that the style belongs to. [default: the embedded one]")
@import_options()
@declared_options(FinetuneOptions)
@out_option
@run_options
def finetune(
    style: str,
    images: Path,
    contents: Path,
    name: str | None,
    base: str | None,
    device: str | None,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    threads: int | None,
    **chosen: Any,
) -> None:
    """Move learned prompts until what they paint looks like the artist's works.

    \b
      lsast-train --style vangogh --images paintings/van-gogh
      lsast-train finetune --style vangogh --images paintings/van-gogh --contents photos --overwrite
      lsast-export --style vangogh

    Prints the prompt file; its style has the strength, guidance and palette of the options as defaults.
    """
    imports = {key: chosen.pop(key) for key in ("controlnet", "vae", "revision", "unet_weights")}
    options = FinetuneOptions(**chosen)
    from ..base.lazy_base import load_base, resolve_local_base
    from ..checkpoints.source import BaseSource
    from ..finetuning.finetuning import Finetuning
    from ..paintings import PaintingDataset
    from ..prompts.prompt_file import find_prompts, load_prompts
    from ..training.run_files import RunFiles, require_run

    set_up_torch(threads)
    with log_to_stderr():
        source = BaseSource(base, **{key: value for key, value in imports.items() if value is not None})
        path = find_prompts(style, resolve_local_base(source))
        loaded = load_base(source)
        prompts = load_prompts(path, loaded)
        name = name or prompts.name
        folder = out or Path("runs") / name
        require_run(RunFiles(folder, name), options.size, loaded.config.multiple, resume, overwrite)
        if options.mixed_precision != "no":
            loaded.round_unet(options.mixed_precision)
        works, others = (
            PaintingDataset.load(tree, options.size, "random", loaded.config.size) for tree in (images, contents)
        )
        result = Finetuning(loaded, prompts, works, others, options, name, folder, resume, device=device).run()
    print_result(result_facts(result), result.file)
