"""`lsast-export import`: read prompts that the released code learned into a prompt file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Command, debug_option, echo, json_option, log_to_stderr, print_result
from lsast_engines.errors import UsageError, fault_list
from lsast_train.cli.shared import import_options


@click.command("import", cls=Command, requires=("export", "torch", "diffusers"))
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--base", metavar="PATH", help="Base whose text encoder resolves them. [default: none, later]")
@import_options()
@click.option("--name", metavar="NAME", help="Name of the style. [default: that of the file]")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder to write to. [default: runs/NAME]")
@json_option
@debug_option
def import_command(file: Path, base: str | None, name: str | None, out: Path | None, **source: Any) -> None:
    """Read FILE, a checkpoint of LSAST's released code (embeddings_gs-99999.pt), without running what is pickled in it.

    With --base its prompts are resolved by the text encoder of that base, and bound to the base. Without, they are
    kept as they are, for any base: lsast-export bundle --style NAME --base BASE --out DIR resolves them later, and so
    does this command on the file that it wrote.
    """
    from lsast_engines.bundle.style import style_name_faults

    if name is not None and (faults := style_name_faults(name)):
        raise UsageError(fault_list("invalid style name:", faults))
    source = {key: value for key, value in source.items() if value is not None}
    given = sorted(f"--{key.replace('_', '-')}" for key in source)
    if base is None and given:
        raise UsageError(f"found {', '.join(given)} without --base; expected the base it belongs to")
    from lsast_train.base.lazy_base import open_base
    from lsast_train.checkpoints.source import BaseSource
    from lsast_train.prompts.prompt_file import Prompts, save_prompts

    from ..styles.released_checkpoint import import_prompts

    with log_to_stderr():
        opened = None if base is None else open_base(BaseSource(base, **source))
        prompts = import_prompts(file, name, opened)
    path = (out or Path("runs") / prompts.name) / f"{prompts.name}.prompts.safetensors"
    save_prompts(prompts, path)
    bound = prompts.base if isinstance(prompts, Prompts) else None
    if bound is None:
        echo("bound to no base yet: --base resolves them", err=True)
    facts = {
        "prompts": str(path),
        "name": prompts.name,
        "base": bound,
        "embeddings": list(prompts.tensors()["embeddings"].shape),
    }
    print_result(facts, path)
