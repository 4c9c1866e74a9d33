"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

backend_option = click.option(
    "--backend", default="onnxruntime", show_default=True, metavar="NAME", help="Backend to compare with torch on."
)


def import_options(hidden: bool = False) -> Callable[[Function], Function]:
    """Adds the options of a base to import, beside `--base`: the other fields of `BaseSource`."""

    def add(command: Function) -> Function:
        for option in (
            click.option("--revision", metavar="REV", hidden=hidden, help="Commit hash or tag of a base from the hub."),
            click.option(
                "--unet-weights",
                type=click.Choice(["auto", "ema", "non-ema"]),
                hidden=hidden,
                help="Weights of a base that holds two sets. [default: auto, the averaged ones (EMA) if there]",
            ),
            click.option(
                "--controlnet",
                metavar="PATH",
                hidden=hidden,
                help="ControlNet of a base to import: a folder, a file, or OWNER/NAME.",
            ),
        ):
            command = option(command)
        return command

    return add
