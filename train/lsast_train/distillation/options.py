"""Options of a distillation. Never imports torch, so that ``lsast-train distill --help`` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from lsast_engines.declared_options import Range, option_faults
from lsast_engines.errors import UsageError, fault_list

MAX_GUIDANCE = 100.0
"""The runtime's limit."""

Solver = Literal["ddim", "dpmpp2m", "unipc", "ddim_lsast"]
"""The keys of `lsast_engines.diffusion.SOLVERS`."""


@dataclass(frozen=True)
class DistillOptions:
    """How guidance is baked into a style.

    Raises:
        UsageError: invalid values, all of them at once.
    """

    guidance: Annotated[float, "Guidance that one pass shall give.", Range(0, MAX_GUIDANCE, above=True)]
    """g of the teacher ε_null + g (ε_style - ε_null), other than 1."""
    teacher_steps: Annotated[int, "Points of the teacher's schedule.", Range(1)] = 12
    strength: Annotated[
        float, "Share of the schedule that the teacher runs, from the noisy end.", Range(0, 1, above=True)
    ] = 1.0
    solver: Annotated[Solver, "Of the teacher's runs."] = "dpmpp2m"
    control_scale: Annotated[float, "Factor of ControlNet's residuals.", Range(0, 2)] = 1.0
    pictures: Annotated[int, "Pictures that the teacher paints for training.", Range(2)] = 48
    """An eighth as many, at least 2, are painted for evaluation."""
    noised: Annotated[int, "Samples of each stage that are noised pictures.", Range(0)] = 16
    steps: Annotated[int, "Optimiser steps; the stages take turns.", Range(1)] = 1000
    batch: Annotated[int, "Samples of a step, all of one stage.", Range(1)] = 4
    lr: Annotated[float, "Learning rate at the start, relative to what is trained.", Range(0, 10, above=True)] = 0.3
    """Relative to the root mean square of what is trained; a half cosine falls to zero."""
    size: Annotated[int, "Side of a picture in pixels.", Range(64)] = 256
    mixed_precision: Annotated[
        Literal["no", "bf16"], "Autocast of the student's pass; teacher and evaluation are float32."
    ] = "no"
    """Its gradients are not scaled, as fp16 would need."""
    seed: Annotated[int, "Seed of all random numbers.", Range(0)] = 0
    evaluate_every: Annotated[int, "Steps between two evaluations.", Range(1)] = 100
    checkpoint_minutes: Annotated[float, Range(0, above=True)] = field(default=5.0, compare=False)
    """Minutes between two checkpoints."""

    def __post_init__(self) -> None:
        faults = option_faults(DistillOptions, vars(self))
        if self.guidance == 1:
            faults.append("guidance: found 1, which takes one pass already; expected another")
        if faults:
            raise UsageError(fault_list("invalid distillation options:", faults))

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2

    @property
    def held_out_pictures(self) -> int:
        """Pictures that the teacher paints for evaluation."""
        return max(2, self.pictures // 8)
