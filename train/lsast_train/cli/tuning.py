"""``lsast-train distill`` and ``finetune``, which begin with learned styles.

Options, progress and results on a terminal. Imports torch only when there is work to do.
"""

from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Command, log_to_stderr
from lsast_engines.errors import UsageError
from lsast_engines.images import require_folder

from ..options import DistillOptions, FinetuneOptions
from ..training.run import RunFiles, find_device
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

_base_option = click.option(
    "--base", metavar="NAME", help="Bundle or base that the style belongs to. [default: the embedded one]"
)


@click.command("distill", cls=Command, requires=EXTRA)
@click.option(
    "-s", "--style", required=True, metavar="NAME", help="Style of the base's bundle or of a run, or its file."
)
@folder_option("--images", required=True, text="Folder tree of any pictures.")
@click.option("--name", help="Name of the new style. [default: STYLE-gGUIDANCE]")
@_base_option
@declared_options(DistillOptions)
@out_option
@run_options
def distill(
    style: str,
    images: Path,
    name: str | None,
    base: str | None,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    device: str | None,
    threads: int | None,
    **chosen: Any,
) -> None:
    """Distill guidance into a style: one pass a step gives what two give.

    \b
      lsast-train distill --style vangogh --guidance 7 --images photos
      lsast-export --style vangogh-g7        # puts it where lsast-run finds it

    Prints the style file; the held-out error is drawn beside it.
    """
    options = DistillOptions(**chosen)
    require_folder(images)
    from ..base.lazy_base import load_base, resolve_local_base
    from ..checkpoints.source import BaseSource
    from ..distillation.distillation import Distillation
    from ..distillation.student import read_style
    from ..paintings import PaintingDataset

    set_up_torch(threads)
    with log_to_stderr():
        source = BaseSource(base)
        if (bundle := resolve_local_base(source)) is None:
            raise UsageError(
                f"found {base}, a base to import; expected the bundle that it was exported to, which a distilled style "
                f"is bound to: lsast-export bundle --base {base} --out DIR"
            )
        loaded = load_base(source)
        found = read_style(style, loaded, bundle)
        name = name or f"{found.name}-g{options.guidance:g}"
        folder = out or Path("runs") / name
        with RunFiles(folder, name, prompts=False).reserved(options.size, loaded.config.multiple, resume, overwrite):
            pictures = PaintingDataset.load(images, options.size, "random", loaded.config.size)
            print_run(Distillation(loaded, found, pictures, options, name, folder, resume, device).run())


@click.command("finetune", cls=Command, requires=EXTRA)
@click.option(
    "-s", "--style", required=True, metavar="NAME", help="Prompts of a run or of the base's bundle, or a file."
)
@folder_option("--images", required=True, text="Folder tree of the artist's pictures.")
@folder_option("--contents", required=True, text="Folder tree of pictures to paint, such as photographs.")
@click.option("--name", help="Name of the new style. [default: STYLE]")
@_base_option
@import_options()
@declared_options(FinetuneOptions)
@out_option
@run_options
def finetune(
    style: str,
    images: Path,
    contents: Path,
    name: str | None,
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
    given, options = take_source(chosen), FinetuneOptions(**chosen)
    for folder in (images, contents):
        require_folder(folder)
    from ..base.lazy_base import load_base, resolve_local_base
    from ..checkpoints.source import BaseSource
    from ..finetuning.finetuning import Finetuning
    from ..paintings import PaintingDataset
    from ..prompts.prompt_file import find_prompts, load_prompts

    set_up_torch(threads)
    with log_to_stderr():
        source = BaseSource(**given)
        path = find_prompts(style, resolve_local_base(source))
        loaded = load_base(source)
        prompts = load_prompts(path, loaded)
        name = name or prompts.name
        folder = out or Path("runs") / name
        with RunFiles(folder, name).reserved(options.size, loaded.config.multiple, resume, overwrite):
            loaded.round_unet(options.mixed_precision, find_device(device))
            works, others = (
                PaintingDataset.load(tree, options.size, "random", loaded.config.size) for tree in (images, contents)
            )
            print_run(Finetuning(loaded, prompts, works, others, options, name, folder, resume, device).run())
