"""Options of an inversion: one frozen dataclass that command line, checkpoint and API share.

Never imports torch, so that ``lsast-train --help`` is quick and works without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lsast_engines.errors import UsageError, fault_list

Variant = Literal["step+layer", "step", "layer", "global"]
"""What prompts depend on: stage and layer group (LSAST), stage (ProSpect), layer group, or nothing (ArtBank)."""

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

MixedPrecision = Literal["no", "bf16", "fp16"]
"""Autocast of the U-Net, in accelerate's words; prompts, loss and optimiser are always float32. ``fp16`` is for
GPUs that have no bf16."""

PLACEHOLDER_TOKENS = 10
"""Default rows of a matrix that passes a text encoder: the released configuration's ``max_vectors_per_token``."""

CHOICES: dict[str, tuple[str, ...]] = {
    "variant": get_args(Variant),
    "generator": get_args(Generator),
    "prompt": get_args(Prompt),
    "layout": get_args(Layout),
    "gradient": get_args(Gradient),
    "schedule": get_args(Schedule),
    "crop": get_args(Crop),
    "weighting": get_args(Weighting),
    "mixed_precision": get_args(MixedPrecision),
}
"""The named values of each option that has some."""


@dataclass(frozen=True)
class Range:
    """The valid values of a number."""

    low: float
    high: float = math.inf
    above: bool = False
    """Whether `low` itself is invalid."""
    whole: bool = False
    """Whether only whole numbers are valid."""

    def faults(self, name: str, value: Any) -> list[str]:
        """A line if `value`, of the option `name`, is invalid."""
        kind = int if self.whole else (int, float)
        sound = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        if sound and self.low <= value <= self.high and not (self.above and value == self.low):
            return []
        expected = f"a {'whole ' * self.whole}number {'above' if self.above else 'of at least'} {self.low:g}"
        limit = f", up to {self.high:g}" if self.high < math.inf else ""
        return [f"{name}: found {value!r}; expected {expected}{limit}"]


_RANGES = {
    **dict.fromkeys(
        ("steps", "batch", "gradient_accumulation", "evaluate_every", "evaluate_latents"), Range(1, whole=True)
    ),
    **dict.fromkeys(("decay_after", "views", "seed"), Range(0, whole=True)),
    **dict.fromkeys(("lr", "checkpoint_minutes"), Range(0, above=True)),
    **dict.fromkeys(("map_lr", "weight_decay"), Range(0)),
    "palette": Range(0, 1),
    "size": Range(64, whole=True),
}


def choice_faults(found: Mapping[str, str]) -> list[str]:
    """Faults of named values, and of layout and variant together; a line each."""
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
        UsageError: invalid values, all of them at once.
    """

    variant: Variant = "step+layer"
    generator: Generator = "attention"
    prompt: Prompt = "auto"
    placeholder_tokens: int | None = None
    """Rows of a matrix where prompts pass a text encoder; each takes a position of its own in the caption. None: 10,
    over which self-attention has something to attend to, and 1 for ``geglu``, as in the release (docs/method.md §7)."""
    layout: Layout = "strided"
    gradient: Gradient = "all"
    steps: int = 100_000
    batch: int = 1
    """Pictures that pass the U-Net at once in each process, each with a timestep of its own."""
    gradient_accumulation: int = 1
    """Batches of a step, one after the other: their mean gradient, in the memory of one."""
    lr: float = 5e-6
    """Learning rate of the matrices, or of the network that generates them, at step 0."""
    map_lr: float = 1.0
    """Learning rate of W_Q, W_K and W_V, as a multiple of `lr`. With about 1/dim a step of theirs moves a prompt as far
    as a step of the matrices does (Yang et al. 2022, Tensor Programs V, for Adam)."""
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
    mixed_precision: MixedPrecision = "no"
    gradient_checkpointing: bool = field(default=False, compare=False)
    """Compute the U-Net's activations again in the backward pass instead of keeping them: less memory, more time."""
    palette: float = field(default=0.0, compare=False)
    """The style's own default of the painting option `palette`."""
    seed: int = 0
    evaluate_every: int = 1000
    """Steps between two evaluations of the held-out loss."""
    evaluate_latents: int = 16
    """Held-out crops, and as many training crops, that an evaluation measures in every stage."""
    checkpoint_minutes: float = field(default=10.0, compare=False)
    """Minutes between two checkpoints."""

    def __post_init__(self) -> None:
        faults = choice_faults({name: getattr(self, name) for name in CHOICES})
        for name, valid in _RANGES.items():
            faults += valid.faults(name, getattr(self, name))
        if self.placeholder_tokens is not None:
            faults += Range(1, whole=True).faults("placeholder_tokens", self.placeholder_tokens)
            if self.prompt == "context":
                faults.append(
                    f"placeholder_tokens: found {self.placeholder_tokens} with prompt context; expected none, "
                    "a context has no placeholder"
                )
        if faults:
            raise UsageError(fault_list("invalid training options:", faults))

    @property
    def rows(self) -> int:
        """Rows of a matrix that passes a text encoder: `placeholder_tokens`, or its default."""
        return self.placeholder_tokens or (1 if self.generator == "geglu" else PLACEHOLDER_TOKENS)

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
        mixed_precision="bf16",
        palette=0.6,
        evaluate_every=60,
        evaluate_latents=12,
        checkpoint_minutes=2.0,
    ),
    "paper": TrainOptions(views=8),
    "released": TrainOptions(
        generator="geglu", layout="overlap", gradient="decoder", lr=1e-6, schedule="constant", crop="squash"
    ),
}
"""``quick``: minutes on two CPU cores with the embedded base. ``paper``: the published recipe, hours on a GPU;
crops are encoded once and kept, not in each step anew.
``released``: what the published code does instead (docs/method.md §3)."""
