"""``lsast-train decoder``: options, progress and results on a terminal. Imports torch only when it works."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lsast_engines.bundle.bundle import PROMPTS
from lsast_engines.cli import Command, log_to_stderr
from lsast_engines.errors import TrainingError, UsageError

from ..finetuning.options import DecoderOptions
from .shared import EXTRA, contents_option, declared_options, parse_pairs, run_options, set_up_torch


@click.command("decoder", cls=Command, requires=EXTRA)
@click.option(
    "-s",
    "--style",
    "styles",
    required=True,
    multiple=True,
    metavar="NAME=DIR",
    help="Prompts of a run or of the base's bundle, or a file, and the folder tree of the artist's works. Repeatable.",
)
@contents_option
@click.option("--base", metavar="NAME", help="Base or bundle with mini's autoencoder. [default: the embedded one]")
@declared_options(DecoderOptions)
@click.option("-o", "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder of the base.")
@run_options
def decoder(
    styles: tuple[str, ...],
    contents: Path,
    base: str | None,
    device: str | None,
    out: Path,
    resume: bool,
    overwrite: bool,
    threads: int | None,
    **chosen: Any,
) -> None:
    """Train the decoder of a base such as mini on what its styles paint.

    \b
      lsast-train decoder --style vangogh=paintings/van-gogh --style monet=paintings/monet \\
          --contents photos --out base
      lsast-export bundle --base base --style vangogh --style monet --out bundle

    Prints the base's folder. The prompts stay valid, since nothing else of the base changes; they are copied into its
    folder "prompts", where lsast-export finds them.
    """
    options, works = DecoderOptions(**chosen), parse_pairs("--style", "NAME=DIR", styles, Path)
    if (out / "base.json").exists() and not overwrite:
        raise TrainingError(f"found the base {out}; replace it with --overwrite, or name another folder with --out")
    from ..base.lazy_base import load_base, resolve_local_base
    from ..checkpoints.source import BaseSource
    from ..finetuning.decoder import DecoderTraining, StyleWorks
    from ..paintings import PaintingDataset
    from ..prompts.prompt_file import find_prompts, load_prompts, save_prompts
    from ..training.run_files import RunFiles, require_run
    from .mini import finish

    set_up_torch(threads)
    with log_to_stderr():
        source = BaseSource(base)
        loaded, place = load_base(source), resolve_local_base(source)
        prompts = {name: load_prompts(find_prompts(name, place), loaded) for name in works}
        if len({style.name for style in prompts.values()}) < len(prompts):
            raise UsageError(f"found one style twice among --style {', '.join(prompts)}; expected each once")
        require_run(RunFiles(out, "decoder"), options.size, loaded.config.multiple, resume)
        size = loaded.config.size
        pairs = {
            prompts[name].name: StyleWorks(prompts[name], PaintingDataset.load(tree, options.size, "random", size))
            for name, tree in works.items()
        }
        others = PaintingDataset.load(contents, options.size, "random", size)
        training = DecoderTraining(loaded, pairs, others, options, out, resume, device=device)
        training.run()
    for style in prompts.values():
        save_prompts(style, out / PROMPTS / f"{style.name}.prompts.safetensors")
    finish(loaded, out, {f"decoder_{name}": str(asdict(options)[name]) for name in ("steps", "paintings")})
    training.files.checkpoint.unlink(missing_ok=True)
