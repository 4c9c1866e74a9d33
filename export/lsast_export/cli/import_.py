"""`lsast-export import`: read prompts that the released code learned into a prompt file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Command, debug_option, json_option, log_to_stderr, print_result
from lsast_engines.errors import UsageError, fault_list
from lsast_train.cli.shared import import_options


@click.command("import", cls=Command, requires=("export", "torch", "diffusers"))
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--base", metavar="PATH", required=True, help="Base whose text encoder resolves them.")
@import_options()
@click.option("--name", metavar="NAME", help="Name of the style. [default: that of the file]")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder to write to. [default: runs/NAME]")
@json_option
@debug_option
def import_command(file: Path, base: str, name: str | None, out: Path | None, **source: Any) -> None:
    """Read FILE, a checkpoint of LSAST's released code (embeddings_gs-99999.pt), without running what is pickled in it.

    The text encoder of --base resolves its prompts and binds them to that base; `lsast-export --style NAME` bakes them.
    """
    from lsast_engines.bundle.style import style_name_faults

    if name is not None and (faults := style_name_faults(name)):
        raise UsageError(fault_list("invalid style name:", faults))
    from lsast_train.base.lazy_base import open_base
    from lsast_train.checkpoints.source import BaseSource
    from lsast_train.prompts.prompt_file import save_prompts

    from ..styles.released_checkpoint import import_prompts

    given = {key: value for key, value in source.items() if value is not None}
    with log_to_stderr():
        prompts = import_prompts(file, open_base(BaseSource(base, **given)), name)
    path = (out or Path("runs") / prompts.name) / f"{prompts.name}.prompts.safetensors"
    save_prompts(prompts, path)
    shape = list(prompts.tensors()["embeddings"].shape)
    print_result({"prompts": str(path), "name": prompts.name, "base": prompts.base, "embeddings": shape}, path)
