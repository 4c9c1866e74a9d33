"""What the commands of ``lsast-export`` share."""

from __future__ import annotations

import time

import click

from lsast_engines.cli import OptionDecorator, combine_options, echo

EXTRA = ("export", "torch", "diffusers", "onnx", "onnxscript")
"""The extra that most commands require, and libraries of it."""


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
            "--controlnet",
            metavar="PATH",
            hidden=hidden,
            help="ControlNet of a base to import: a folder, a file, or OWNER/NAME.",
        ),
        click.option(
            "--vae",
            metavar="PATH",
            hidden=hidden,
            help="Autoencoder of a base to import, such as ft-mse, in the forms of --controlnet.",
        ),
    )


class PhaseTimer:
    """A `Progress` that prints each phase on stderr as it begins, and measures how long each takes."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._starts: list[tuple[str, float]] = []

    def __call__(self, phase: str, detail: str = "") -> None:
        """See `lsast_export.progress.Progress`."""
        now = time.perf_counter() - self._began
        if not detail:
            self._starts.append((phase, now))
        echo(f"[{now:6.1f} s] {detail and '  '}{detail or phase}", err=True)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in order; the last one ends now."""
        ends = [start for _, start in self._starts[1:]] + [time.perf_counter() - self._began]
        return {phase: round(end - start, 3) for (phase, start), end in zip(self._starts, ends, strict=True)}
