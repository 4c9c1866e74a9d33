"""What the commands of ``lsast-train`` share."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import OptionDecorator, combine_options, debug_option, json_option, print_result
from lsast_engines.declared_options import rules_of

EXTRA = ("train", "torch", "diffusers", "accelerate", "matplotlib")
"""The extra that the commands require, and what it installs."""


def folder_option(*names: str, text: str, **more: Any) -> OptionDecorator:
    """An option that is a folder; `more` is for ``click.option``."""
    return click.option(*names, metavar="DIR", type=click.Path(path_type=Path), help=text, **more)


device_option = click.option(
    "--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps. [default: auto, a CUDA GPU if one is there]"
)
"""Adds ``--device`` to a command."""

threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
"""Adds ``--threads`` to a command."""


out_option = folder_option("-o", "--out", text="Folder to write to. [default: runs/NAME]")
"""Adds ``--out`` to a command."""

run_options = combine_options(
    debug_option,
    json_option,
    threads_option,
    click.option("--overwrite", is_flag=True, help="Replace the result of a finished training."),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint of a stopped run."),
    device_option,
)
"""Adds what every run takes."""


def set_up_torch(threads: int | None) -> None:
    """Take so many threads (None: all cores), and TF32 for float32 matrices on a GPU."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def import_options(hidden: bool = False) -> OptionDecorator:
    """Adds the options of a base to import, beside `--base`: the other fields of `BaseSource`."""
    return combine_options(
        click.option("--revision", metavar="REV", hidden=hidden, help="Commit hash or tag of a base from the hub."),
        click.option(
            "--unet-weights",
            type=click.Choice(["auto", "ema", "non-ema"]),
            hidden=hidden,
            help="Weights of a base that holds two sets. [default: auto, the averaged ones (EMA) if there]",
        ),
        click.option(
            "--vae",
            metavar="PATH",
            hidden=hidden,
            help="Autoencoder of a base to import, such as ft-mse, in the forms of --controlnet.",
        ),
        click.option(
            "--controlnet",
            metavar="PATH",
            hidden=hidden,
            help="ControlNet of a base to import: a folder, a file, or OWNER/NAME.",
        ),
    )


def take_source(chosen: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of `BaseSource` that were given out of a command's options."""
    names = ("base", "controlnet", "vae", "unet_weights", "revision")
    return {name: value for name in names if (value := chosen.pop(name, None)) is not None}


class _Choice(click.Choice[str]):
    """A named value; ``fp32``, that of earlier versions, is ``no`` where that is one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert("no" if value == "fp32" and "no" in self.choices else value, param, ctx)


def declared_options(options: type, quick: Any = None) -> OptionDecorator:
    """What adds the options that the dataclass `options` declares with a help text to a command.

    Args:
        options: see `lsast_engines.declared_options`.
        quick: the preset whose values the help shows; an option that is not given is None then. None: the declared
            defaults are shown and taken.
    """
    added = []
    for name, option in rules_of(options).items():
        if not option.help:
            continue
        flag, preset = f"--{name.replace('_', '-')}", getattr(quick, name, None)
        required = quick is None and option.default is None
        # click 8.3 and later take a default of None for a value, with which nothing is missing.
        default = {} if required else {"default": option.default if quick is None else None}
        added.append(
            click.option(
                f"{flag}/--no-{flag[2:]}" if option.type is bool else flag,
                name,
                type=_Choice(option.choices) if option.choices else option.type,
                metavar={int: "N", float: "NUMBER"}.get(option.type),
                required=required,
                show_default=quick is None,
                help=option.help + ("" if preset is None or option.type is bool else f" [quick: {preset}]"),
                **default,
            )
        )
    return combine_options(*reversed(added))


def print_run(result: Any) -> None:
    """Print the `RunResult` of a run."""
    facts = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(result).items()}
    print_result(facts, result.file)
