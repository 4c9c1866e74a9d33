"""``lsast-train distill``: options, progress and results on a terminal. Imports torch only when there is work to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Command, log_to_stderr, print_result
from lsast_engines.errors import UsageError

from ..distillation.options import DistillOptions
from .shared import EXTRA, declared_options, out_option, result_facts, run_options, set_up_torch


@click.command("distill", cls=Command, requires=EXTRA)
@click.option(
    "-s", "--style", required=True, metavar="NAME", help="Style of the base's bundle or of a run, or its file."
)
@click.option(
    "--images", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder tree of any pictures."
)
@click.option("--name", help="Name of the new style. [default: STYLE-gGUIDANCE]")
@click.option("--base", metavar="NAME", help="Bundle or base that the style belongs to. [default: the embedded one]")
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
    """Bake guidance into a style: one pass a step gives what two give.

    \b
      lsast-train distill --style vangogh --guidance 7 --images photos
      lsast-export --style vangogh-g7        # puts it where lsast-run finds it

    Prints the style file; the held-out error is drawn beside it.
    """
    options = DistillOptions(**chosen)
    from ..base.lazy_base import load_base, resolve_local_base
    from ..checkpoints.source import BaseSource
    from ..distillation.distillation import Distillation
    from ..distillation.source_style import read_style
    from ..paintings import PaintingDataset
    from ..training.run_files import RunFiles, require_run

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
        require_run(RunFiles(folder, name, prompts=False), options.size, loaded.config.multiple, resume, overwrite)
        pictures = PaintingDataset.load(images, options.size, "random", loaded.config.size)
        result = Distillation(loaded, found, pictures, options, name, folder, resume, device=device).run()
    print_result(result_facts(result), result.file)
