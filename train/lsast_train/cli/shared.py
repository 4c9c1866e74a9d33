"""What the commands of ``lsast-train`` share."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lsast_engines.errors import MissingExtraError

from ..distillation.options import PRECISIONS
from ..options import CHOICES

_LIBRARIES = ("torch", "diffusers", "accelerate", "matplotlib")
"""What the extra [train] installs."""


class _MixedPrecision(click.Choice[str]):
    """``no`` or ``bf16``; ``fp32``, the value of earlier versions, is ``no``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert("no" if value == "fp32" else value, param, ctx)


MIXED_PRECISION = _MixedPrecision(CHOICES["mixed_precision"])
"""Type of the option ``--mixed-precision`` of a training of prompts."""

DISTILL_PRECISION = _MixedPrecision(PRECISIONS)
"""Type of the option ``--mixed-precision`` of a distillation."""

device_option = click.option(
    "--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps. [default: auto, a CUDA GPU if one is there]"
)
"""Adds ``--device`` to a command."""

threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
"""Adds ``--threads`` to a command."""


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the result of a finished training.")
"""Adds ``--overwrite`` to a command."""


def require_train_extra() -> None:
    """Raise `MissingExtraError` for the first library of the extra [train] that is not installed."""
    for library in _LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, "train")


def result_facts(result: Any) -> dict[str, Any]:
    """The fields of a result as JSON values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(result).items()}
