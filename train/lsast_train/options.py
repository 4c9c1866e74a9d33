"""Every knob of an inversion, in one frozen dataclass that command line, checkpoint and API share.

Never imports torch, so that ``lsast-train --help`` is quick and works without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from lsast_engines.errors import UsageError, fault_list

Variant = Literal["step+layer", "step", "layer", "global"]
"""What the prompts know: stage and layer group (LSAST), stage only (ProSpect), layer group only, nothing (ArtBank)."""

Generator = Literal["attention", "direct", "geglu"]
"""Where a matrix comes from: self-attention over the tokens of a learned one, a learned one as it is, or the released
code's network on a constant (docs/method.md §1.3)."""

Prompt = Literal["auto", "context", "text"]
"""What a matrix is: the context itself, or the embedding of the caption's placeholder, which the base's text encoder
turns into the context (docs/method.md §2). ``auto``: text where the base has a text encoder."""

Layout = Literal["strided", "overlap"]
"""Which matrix serves stage s and group l: k = 3s + l, or k = s + l as in the released code (docs/method.md §1.4)."""

Gradient = Literal["all", "decoder"]
"""Whether all layer groups train the prompts, or only the decoder, as in the released code (docs/method.md §3)."""

Schedule = Literal["constant", "step", "cosine"]
"""Learning rate over the steps: constant, divided by 10 after `decay_after` steps, or a half cosine down to zero."""

Crop = Literal["random", "squash"]
"""How a painting becomes square: random crops, or the whole squeezed (the released code; proportions are lost)."""

Weighting = Literal["eps", "v"]
"""Loss weight of timestep t: 1 (error of the noise), or 1/ᾱ up to 20 (error of v, Salimans & Ho 2022, appendix D)."""

Precision = Literal["fp32", "bf16"]
"""Arithmetic of the U-Net; prompts, loss and optimiser are always float32."""

CHOICES: dict[str, tuple[str, ...]] = {
    "variant": get_args(Variant),
    "generator": get_args(Generator),
    "prompt": get_args(Prompt),
    "layout": get_args(Layout),
    "gradient": get_args(Gradient),
    "schedule": get_args(Schedule),
    "crop": get_args(Crop),
    "weighting": get_args(Weighting),
    "precision": get_args(Precision),
}
"""The named values of each option that has some."""


def choice_faults(found: Mapping[str, str]) -> list[str]:
    """What is wrong with named values, and with layout and variant together; a line each."""
    faults = [
        f"{name}: found {value!r}; expected one of {', '.join(CHOICES[name])}"
        for name, value in found.items()
        if value not in CHOICES[name]
    ]
    if found.get("layout") == "overlap" and found.get("variant") != "step+layer":
        faults.append(
            f"layout: found overlap with variant {found.get('variant')!r}; expected it with step+layer only, "
            "the other variants have nothing to overlap: leave the layout strided"
        )
    return faults


@dataclass(frozen=True)
class TrainOptions:
    """How prompts are learned. The defaults are the paper's.

    Raises:
        UsageError: values that cannot be meant, all of them at once.
    """

    variant: Variant = "step+layer"
    generator: Generator = "attention"
    prompt: Prompt = "auto"
    placeholder_tokens: int = 1
    """Tokens of the caption's placeholder, so of a matrix, where prompts pass a text encoder; 1 in the release."""
    layout: Layout = "strided"
    gradient: Gradient = "all"
    steps: int = 100_000
    batch: int = 1
    """Pictures of a step in each process, each with a timestep of its own."""
    lr: float = 5e-6
    """Learning rate of the matrices, or of the network that generates them, at step 0."""
    map_lr: float = 1.0
    """Learning rate of the attention's maps, as a multiple of `lr`. About 1/dim makes a step of the maps move a prompt
    as far as a step of the matrices does (Yang et al. 2022, Tensor Programs V, for Adam)."""
    schedule: Schedule = "step"
    decay_after: int = 20_000
    """Steps before the learning rate is divided by 10 (schedule ``step`` only)."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    size: int = 512
    """Side of a training picture in pixels."""
    crop: Crop = "random"
    views: int = 0
    """Crops of each painting that are encoded once and kept, each also mirrored; 0 encodes a fresh crop every time."""
    weighting: Weighting = "eps"
    precision: Precision = "fp32"
    gradient_checkpointing: bool = field(default=False, compare=False)
    """Compute the U-Net's activations again on the way back instead of keeping them: less memory, more time."""
    seed: int = 0
    evaluate_every: int = 1000
    """Steps between two evaluations of the held-out loss."""
    evaluate_latents: int = 16
    """Held-out (and as many training) crops that an evaluation looks at, in every stage."""
    checkpoint_minutes: float = field(default=10.0, compare=False)
    """Minutes between two checkpoints."""

    def __post_init__(self) -> None:
        faults = choice_faults({name: getattr(self, name) for name in CHOICES})
        least = {
            "steps": 1,
            "batch": 1,
            "placeholder_tokens": 1,
            "decay_after": 0,
            "size": 64,
            "views": 0,
            "seed": 0,
            "evaluate_every": 1,
            "evaluate_latents": 1,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                faults.append(f"{name}: found {value!r}; expected a whole number of at least {minimum}")
        for name, positive in {"lr": True, "map_lr": False, "weight_decay": False, "checkpoint_minutes": True}.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                faults.append(f"{name}: found {value}; expected a number {'above' if positive else 'of at least'} 0")
        if self.prompt == "context" and self.placeholder_tokens != 1:
            faults.append(
                f"placeholder_tokens: found {self.placeholder_tokens} with prompt context; expected 1, "
                "a context has no placeholder"
            )
        if faults:
            raise UsageError(fault_list("these training options cannot be meant:", faults))

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        if self.schedule == "step":
            return self.lr if step < self.decay_after else self.lr / 10
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.lr


PRESETS: dict[str, TrainOptions] = {
    "quick": TrainOptions(
        steps=300,
        batch=12,
        lr=3e-2,
        map_lr=0.004,
        schedule="cosine",
        weight_decay=0.0,
        size=256,
        views=4,
        weighting="v",
        precision="bf16",
        evaluate_every=60,
        evaluate_latents=12,
        checkpoint_minutes=2.0,
    ),
    "paper": TrainOptions(),
    "released": TrainOptions(
        generator="geglu",
        layout="overlap",
        gradient="decoder",
        lr=1e-6,
        schedule="constant",
        crop="squash",
    ),
}
"""``quick``: minutes on two CPU cores with the embedded base. ``paper``: the published recipe, hours on a GPU.
``released``: what the published code does instead (docs/method.md §3)."""


def style_name_faults(name: str) -> list[str]:
    """What keeps `name` from being a style's name, and with it a file's name everywhere; at most one line."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        return []
    return [f"name: found {name!r}; expected up to 100 letters, digits, '.', '_' or '-', a letter or digit first"]
