"""`lsast-export`: bake styles and import prompts; its commands export, check and change bundles.

The result's path, or with `--json` one JSON object, goes to stdout; phases and errors go to stderr. Exit status: 0
done, 1 failed, 2 wrong usage, 130 interrupted. torch and onnx are imported only when there is something to do.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click

from lsast_engines.backends.tensorrt.engine_record import TrtFlavor
from lsast_engines.bundle.style import parse_defaults
from lsast_engines.cli import Command, Group, debug_option, json_option, log_to_stderr, print_result
from lsast_engines.environment import require_extra
from lsast_engines.errors import UsageError, fault_list
from lsast_train.cli.shared import folder_option, import_options

from .bundle import (
    EXTRA,
    bundle_command,
    bundle_options,
    check_command,
    decoder_command,
    export,
    style_options,
)
from .compile import compile_command, compile_engines
from .quantize import quantize_command


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, which removes what is unfinished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@click.group("lsast-export", cls=Group, invoke_without_command=True, requires=("export", "torch"))
@style_options
@bundle_options(hidden=True)
@json_option
@debug_option
@click.pass_context
def main(
    ctx: click.Context, /, styles: tuple[str, ...], base: str | None, defaults: tuple[str, ...], **options: Any
) -> None:
    """Bake the styles that lsast-train learned, for lsast-run to paint with.

    \b
      lsast-export --style vangogh
      lsast-export bundle --base sd15 --out engines/sd15

    A style is baked for the bundle of its base and put into your style folder; a base that is no bundle yet is
    exported by the command `bundle`. With --backend tensorrt-rtx or tensorrt, missing engines are compiled, too.
    """
    ctx.with_resource(_sigterm_as_ctrl_c())
    given = [name for name, value in options.items() if value]
    if ctx.invoked_subcommand is not None:
        if given or styles or base or defaults:
            raise UsageError(f"found options before {ctx.invoked_subcommand!r}; expected them behind it")
    elif options["out"] is not None:  # what the command `bundle` does was spelled so before
        require_extra(*EXTRA)
        export(styles, base, defaults, **options)
    elif not styles:
        raise UsageError(
            f"found nothing to do; expected --style NAME, or one of the commands {', '.join(sorted(main.commands))} "
            "(--help)"
        )
    elif given and (given != ["backend"] or options["backend"] not in get_args(TrtFlavor)):
        raise UsageError(
            f"found {', '.join('--' + name.replace('_', '-') for name in given)}, which belongs to a whole bundle; "
            "expected it with the command: lsast-export bundle"
        )
    else:
        bake(styles, base, defaults, options["backend"])


def bake(
    styles: tuple[str, ...], base: str | None, defaults: tuple[str, ...], backend: TrtFlavor | None = None
) -> None:
    """Bake `styles` for the bundle `base`, with defaults of their own, into the user's style folder.

    With `backend`, the engines of the bundle that are missing are compiled, too.
    """
    click.get_current_context().with_resource(log_to_stderr(logging.WARNING))
    if backend is not None:
        require_extra(*EXTRA)
    for_bundle, for_styles = parse_defaults(defaults)
    if for_bundle:
        raise UsageError(
            f"found --default {', '.join(for_bundle)}, which belongs to a whole bundle; expected STYLE.KEY=VALUE"
        )
    from lsast_engines.bundle.bundle import Bundle, find_bundle
    from lsast_engines.bundle.manifest import MANIFEST

    from ..styles.bake import bake_for_bundle, find_distilled, read_prompts, with_defaults

    distilled = {name: path for name in styles if (path := find_distilled(name)) is not None}
    folder = Path(base or "").expanduser()
    if base is not None and (folder / "base.json").is_file() and not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder} is a base that was not exported yet; expected a bundle: "
            f"lsast-export bundle --base {base} --out DIR"
        )
    bundle = Bundle.open(find_bundle(base))
    learned = read_prompts([name for name in styles if name not in distilled], bundle.path)
    prompts = with_defaults(learned, for_styles)
    baked = bake_for_bundle(bundle, prompts, list(distilled.values()))
    paths = {name: str(path) for name, path in baked.items()}
    facts: dict[str, Any] = {"bundle": str(bundle.path), "fingerprint": bundle.manifest.fingerprint, "styles": paths}
    if backend is not None:
        from ..tensorrt.compile import CompileOptions

        facts["compiled"] = compile_engines(bundle.path, CompileOptions(backend))
    print_result(facts, *paths.values())


@click.command("import", cls=Command, requires=("export", "torch", "diffusers"))
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--base", metavar="PATH", required=True, help="Base whose text encoder resolves them.")
@import_options()
@click.option("--name", metavar="NAME", help="Name of the style. [default: that of the file]")
@folder_option("-o", "--out", text="Folder to write to. [default: runs/NAME]")
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


for _command in (
    bundle_command,
    check_command,
    compile_command,
    decoder_command,
    import_command,
    quantize_command,
):
    main.add_command(_command)
