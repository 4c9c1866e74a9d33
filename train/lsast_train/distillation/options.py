"""Options of a distillation. Never imports torch, so that ``lsast-train distill --help`` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lsast_engines.diffusion.solvers import SOLVERS
from lsast_engines.errors import UsageError, fault_list

from ..options import MixedPrecision, Range

MAX_GUIDANCE = 100.0
"""The runtime's limit."""

_RANGES = {
    **dict.fromkeys(("teacher_steps", "steps", "batch", "evaluate_every"), Range(1, whole=True)),
    **dict.fromkeys(("noised", "seed"), Range(0, whole=True)),
    "pictures": Range(2, whole=True),
    "size": Range(64, whole=True),
    "guidance": Range(0, MAX_GUIDANCE, above=True),
    "strength": Range(0, 1, above=True),
    "control_scale": Range(0, 2),
    "lr": Range(0, 10, above=True),
    "checkpoint_minutes": Range(0, above=True),
}


PRECISIONS: tuple[MixedPrecision, ...] = ("no", "bf16")
"""The autocasts of a distillation, whose gradients are not scaled as fp16 would need."""


@dataclass(frozen=True)
class DistillOptions:
    """How guidance is baked into a style.

    Raises:
        UsageError: invalid values, all of them at once.
    """

    guidance: float
    """g of the teacher ε_null + g (ε_style - ε_null), other than 1."""
    teacher_steps: int = 12
    """Points of the teacher's schedule."""
    strength: float = 1.0
    """Share of the schedule that the teacher runs, from the noisy end to the picture."""
    solver: str = "dpmpp2m"
    """Of the teacher's runs."""
    control_scale: float = 1.0
    """Factor of ControlNet's residuals."""
    pictures: int = 48
    """Pictures that the teacher paints for training; an eighth as many, at least 2, are painted for evaluation."""
    noised: int = 16
    """Training samples of each stage that are noised pictures, beside those of the teacher's trajectories."""
    steps: int = 1000
    """Steps of the optimiser, each for one stage; the stages take turns."""
    batch: int = 4
    """Samples of a step, all of one stage."""
    lr: float = 0.3
    """Learning rate at step 0, relative to the root mean square of what is trained; a half cosine falls to zero."""
    size: int = 256
    """Side of a picture in pixels."""
    mixed_precision: MixedPrecision = "no"
    """Autocast of the student's pass in training; teacher and evaluation are float32."""
    seed: int = 0
    evaluate_every: int = 100
    """Steps between two evaluations."""
    checkpoint_minutes: float = field(default=5.0, compare=False)
    """Minutes between two checkpoints."""

    def __post_init__(self) -> None:
        choices = {"solver": tuple(SOLVERS), "mixed_precision": PRECISIONS}
        faults = [
            f"{name}: found {getattr(self, name)!r}; expected one of {', '.join(allowed)}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]
        for name, valid in _RANGES.items():
            faults += valid.faults(name, getattr(self, name))
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
