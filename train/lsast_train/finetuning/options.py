"""Options of ``lsast-train finetune`` and ``lsast-train decoder``. Never imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from lsast_engines.declared_options import Range, option_faults
from lsast_engines.errors import UsageError, fault_list

LR_WARMUP = 20
"""Steps in which the decoder's learning rate rises."""


@dataclass(frozen=True)
class FinetuneOptions:
    """How prompts are fine-tuned. The options of the sampler become the style's own defaults.

    Raises:
        UsageError: invalid values, all of them at once.
    """

    steps: Annotated[int, "Optimiser steps.", Range(1)] = 24
    batch: Annotated[int, "Pictures that are painted in a step.", Range(1)] = 4
    lr: Annotated[float, "Learning rate at the start, relative to the prompts' size.", Range(0, above=True)] = 0.03
    """In root mean squares of the prompts; it falls to zero by half a cosine."""
    size: Annotated[int, "Side of a picture that is painted, in pixels.", Range(64)] = 256
    strength: Annotated[float, "Strength that the style is for.", Range(0, 1, above=True)] = 0.35
    guidance: Annotated[float, "Guidance that the style is for.", Range(1)] = 6.0
    palette: Annotated[float, "Palette that the style is for.", Range(0, 1)] = 0.8
    content_weight: Annotated[float, "Weight of the loss of content.", Range(0)] = 9.0
    mixed_precision: Annotated[Literal["no", "bf16"], "Autocast of the networks."] = "bf16"
    seed: Annotated[int, "Seed of all random numbers.", Range(0)] = 0
    evaluate_every: Annotated[int, Range(1)] = 8
    """Steps between two evaluations on held-out pictures."""
    checkpoint_minutes: Annotated[float, Range(0, above=True)] = field(default=2.0, compare=False)
    """Minutes between two checkpoints."""

    def __post_init__(self) -> None:
        if faults := option_faults(FinetuneOptions, vars(self)):
            raise UsageError(fault_list("invalid options of finetune:", faults))

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True)
class DecoderOptions:
    """How a decoder is trained on the paintings of a base's styles.

    Raises:
        UsageError: invalid values, all of them at once.
    """

    steps: Annotated[int, "Optimiser steps; each is of one style, in turn.", Range(1)] = 400
    batch: Annotated[int, "Paintings that are decoded in a step.", Range(2)] = 6
    paintings: Annotated[int, "Pictures that each style paints beforehand.", Range(1)] = 96
    lr: Annotated[float, "Learning rate at its highest.", Range(0, above=True)] = 2e-4
    """It rises over the first `LR_WARMUP` steps and falls to zero by half a cosine."""
    size: Annotated[int, "Side of a picture that is painted, in pixels.", Range(64)] = 256
    content_weight: Annotated[float, "Weight of the loss of content.", Range(0)] = 9.0
    reconstruction_weight: Annotated[float, "Weight of what real pictures lose by encoding and decoding.", Range(0)] = (
        1.0
    )
    mixed_precision: Annotated[Literal["no", "bf16"], "Autocast of the networks."] = "bf16"
    seed: Annotated[int, "Seed of all random numbers.", Range(0)] = 0
    evaluate_every: Annotated[int, Range(1)] = 100
    """Steps between two evaluations on held-out pictures."""
    checkpoint_minutes: Annotated[float, Range(0, above=True)] = field(default=2.0, compare=False)
    """Minutes between two checkpoints."""

    def __post_init__(self) -> None:
        if faults := option_faults(DecoderOptions, vars(self)):
            raise UsageError(fault_list("invalid options of decoder:", faults))

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        rise = min(1.0, (step + 1) / LR_WARMUP)
        return self.lr * rise * (1 + math.cos(math.pi * step / self.steps)) / 2
