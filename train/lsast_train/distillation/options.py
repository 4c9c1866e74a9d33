"""Every knob of a distillation. Never imports torch, so that ``lsast-train distil --help`` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from lsast_engines.diffusion.timesteps import ENDS_INSIDE
from lsast_engines.errors import UsageError, fault_list

from ..options import Precision

Kind = Literal["kv", "prompts"]
"""What is moved: the U-Net's keys and values themselves, or the 30 prompts that keys and values are projected from."""

LARGEST_GUIDANCE = 100.0
"""As large as the runtime takes."""


@dataclass(frozen=True)
class DistilOptions:
    """How guidance is baked into a style.

    Raises:
        UsageError: values that cannot be meant, all of them at once.
    """

    guidance: float
    """g of the teacher ε_null + g (ε_style - ε_null); other than 1, which needs no teacher, unless `student_steps`."""
    kind: Kind = "kv"
    student_steps: int = 0
    """Points of the schedule that the style is for, whose few steps are to land where the teacher's many do; 0: one
    pass is to give what the teacher's two give, at any step of any schedule."""
    teacher_steps: int = 12
    """Points of the teacher's schedule; with `student_steps` at least so many, a multiple is taken."""
    strength: float = 1.0
    """Share of the schedule that the teacher runs, from the noisy end to the picture."""
    solver: str = "dpmpp2m"
    """Of the teacher's runs; with `student_steps` of the style's too."""
    control: float = 1.0
    """What ControlNet's residuals are multiplied with."""
    pictures: int = 48
    """Pictures that the teacher paints for training; an eighth as many, at least 2, are painted for evaluation."""
    noised: int = 16
    """Training states of each stage that are pictures noised, beside those on the teacher's way; none with
    `student_steps`."""
    steps: int = 1000
    """Steps of the optimiser, each for one stage; the stages take turns."""
    batch: int = 4
    """States of a step, all of one stage."""
    lr: float = 0.3
    """Learning rate at step 0, in units of the root mean square of what is moved; a half cosine brings it to zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, towards the start."""
    size: int = 256
    """Side of a picture in pixels."""
    precision: Precision = "fp32"
    """Arithmetic of the student's pass in training; teacher and evaluation are float32."""
    seed: int = 0
    evaluate_every: int = 100
    """Steps between two evaluations."""
    checkpoint_minutes: float = field(default=5.0, compare=False)
    """Minutes between two checkpoints."""

    def __post_init__(self) -> None:
        faults = []
        choices = {"kind": get_args(Kind), "solver": tuple(ENDS_INSIDE), "precision": get_args(Precision)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                faults.append(f"{name}: found {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        least = {"student_steps": 0, "teacher_steps": 1, "pictures": 2, "noised": 0, "steps": 1, "batch": 1, "size": 64,
                 "seed": 0, "evaluate_every": 1}  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                faults.append(f"{name}: found {value!r}; expected a whole number of at least {minimum}")
        ranges = {"guidance": (0.0, LARGEST_GUIDANCE), "strength": (0.0, 1.0), "control": (0.0, 2.0),
                  "lr": (0.0, 10.0), "weight_decay": (0.0, 1.0), "checkpoint_minutes": (0.0, 1e6)}  # fmt: skip
        zero = ("control", "weight_decay")
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not math.isfinite(value) or not (low <= value <= high) or (value == low and name not in zero):
                above = "a number of" if name in zero else "a number above"
                faults.append(f"{name}: found {value}; expected {above} {low:g}, up to {high:g}")
        if self.guidance == 1 and not self.student_steps:
            faults.append("guidance: found 1, which takes one pass already; expected another, or student_steps")
        if self.student_steps > self.teacher_steps:
            faults.append(
                f"teacher_steps: found {self.teacher_steps} for {self.student_steps} of the student; expected at least "
                "as many, such as 32"
            )
        if faults:
            raise UsageError(fault_list("this distillation cannot be meant:", faults))

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2

    @property
    def held_out_pictures(self) -> int:
        """Pictures that the teacher paints for evaluation."""
        return max(2, self.pictures // 8)
