"""Options of the trainings, declared once: for the checks, the command line, checkpoints and the API.

Never imports torch, so that ``lsast-train --help`` is quick and works without it.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from lsast_engines.declared_options import Range, option_faults
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
"""How a painting becomes square: random crops, or the whole picture stretched to a square (the released code)."""

Weighting = Literal["eps", "v"]
"""Loss weight of timestep t: 1 (error of the noise), or 1/ᾱ up to 20 (error of v, Salimans & Ho 2022, appendix D)."""

MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
"""Autocast of the U-Net, in accelerate's words; prompts, loss and optimiser are always float32. ``auto``: bf16, but
none on a processor that only emulates it, where it is many times slower. ``fp16`` is for GPUs without bf16."""

Solver = Literal["ddim", "dpmpp2m", "unipc", "ddim_lsast"]
"""The keys of `lsast_engines.diffusion.SOLVERS`."""

PLACEHOLDER_TOKENS = 10
"""Default rows of a matrix that passes a text encoder: the released configuration's ``max_vectors_per_token``."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a training run. The learning rate falls to zero by half a cosine.

    `UsageError` for invalid values, all of them at once.
    """

    def __post_init__(self) -> None:
        if faults := [*option_faults(type(self), vars(self)), *self.conflicts()]:
            raise UsageError(fault_list("invalid options:", faults))

    def conflicts(self) -> list[str]:
        """Values that are not allowed together, a line each."""
        return []

    def identity(self) -> dict[str, Any]:
        """The options that change a result, by name: those that ``==`` compares."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.compare}

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        given: Any = self
        return float(given.lr * (1 + math.cos(math.pi * step / given.steps)) / 2)


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """How prompts are learned. The defaults are the paper's, as far as we know them (docs/method.md §7)."""

    variant: Annotated[Variant, "What prompts depend on: stage, layer group, both, nothing."] = "step+layer"
    generator: Annotated[Generator, "Where a matrix comes from."] = "attention"
    prompt: Annotated[Prompt, "A matrix is a context, or goes through the text encoder."] = "auto"
    placeholder_tokens: Annotated[
        int | None, "Rows of a matrix that goes through the text encoder. [default: 10; geglu: 1]", Range(1)
    ] = None
    """Each row takes a position of its own in the caption. Over 10 self-attention has something to attend to; ``geglu``
    has 1, as in the release (docs/method.md §7)."""
    layout: Annotated[Layout, "Matrix of stage s, layer group l: 3s+l or s+l."] = "strided"
    gradient: Annotated[Gradient, "Layer groups that train the prompts: all, or the U-Net's decoder (up) only."] = "all"
    steps: Annotated[int, "Optimiser steps.", Range(1)] = 100_000
    batch: Annotated[int, "Pictures that pass the U-Net at once in each process.", Range(1)] = 1
    """Each picture has a timestep of its own."""
    gradient_accumulation: Annotated[int, "Batches of a step, in the memory of one.", Range(1)] = 1
    lr: Annotated[float, "Learning rate at the start.", Range(0, above=True)] = 5e-6
    """Of the matrices, or of the network that generates them."""
    map_lr: Annotated[float, Range(0)] = 1.0
    """Learning rate of W_Q, W_K and W_V, as a multiple of `lr`. With about 1/dim a step of theirs moves a prompt as far
    as a step of the matrices does (Yang et al. 2022, Tensor Programs V, for Adam)."""
    schedule: Schedule = "step"
    decay_after: Annotated[int, Range(0)] = 20_000
    """Steps before the learning rate is divided by 10 (schedule ``step`` only)."""
    weight_decay: Annotated[float, Range(0)] = 0.01
    """AdamW's decoupled weight decay."""
    size: Annotated[int, "Side of a training picture in pixels.", Range(64)] = 512
    crop: Annotated[Crop, "How a picture becomes square."] = "random"
    views: Annotated[int, "Crops of a picture, which are encoded once and kept.", Range(1)] = 8
    """Each crop is kept mirrored, too. A step draws a sample of its posterior."""
    weighting: Annotated[Weighting, "Which error the loss counts."] = "eps"
    mixed_precision: Annotated[MixedPrecision, "Autocast of the U-Net; auto: bf16 where the hardware has it."] = "no"
    gradient_checkpointing: Annotated[
        bool, "Compute activations twice instead of keeping them: less memory, more time."
    ] = field(default=False, compare=False)
    palette: Annotated[float, Range(0, 1)] = field(default=0.0, compare=False)
    """The style's own default of the painting option `palette`."""
    seed: Annotated[int, "Seed of all random numbers.", Range(0, 2**63 - 1)] = 0
    evaluate_every: Annotated[int, Range(1)] = 1000
    """Steps between two evaluations of the held-out loss."""
    evaluate_latents: Annotated[int, Range(1)] = 16
    """Held-out crops, and as many training crops, that an evaluation measures in every stage."""
    checkpoint_minutes: Annotated[float, Range(0, above=True)] = field(default=10.0, compare=False)
    """Minutes between two checkpoints."""

    def conflicts(self) -> list[str]:
        """See `RunOptions`."""
        faults = []
        if self.layout == "overlap" and self.variant != "step+layer":
            faults.append(
                f"layout: found overlap with variant {self.variant!r}; expected it with step+layer only, the other "
                "variants have nothing to overlap: leave the layout strided"
            )
        if self.placeholder_tokens is not None and self.prompt == "context":
            faults.append(
                f"placeholder_tokens: found {self.placeholder_tokens} with prompt context; expected none, a context "
                "has no placeholder"
            )
        return faults

    @property
    def rows(self) -> int:
        """Rows of a matrix that passes a text encoder: `placeholder_tokens`, or its default."""
        return self.placeholder_tokens or (1 if self.generator == "geglu" else PLACEHOLDER_TOKENS)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        if self.schedule == "step":
            return self.lr if step < self.decay_after else self.lr / 10
        return super().learning_rate(step) if self.schedule == "cosine" else self.lr


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
        mixed_precision="auto",
        palette=0.6,
        evaluate_every=60,
        evaluate_latents=12,
        checkpoint_minutes=2.0,
    ),
    "paper": TrainOptions(),
    "released": TrainOptions(
        generator="geglu", layout="overlap", gradient="decoder", lr=1e-6, schedule="constant", crop="squash", views=1
    ),
}
"""``quick``: minutes on two CPU cores with the embedded base. ``paper``: the paper's recipe as far as we know it, hours
on a GPU. ``released``: what the published code does instead (docs/method.md §3), but that pictures are encoded once."""


@dataclass(frozen=True)
class FinetuneOptions(RunOptions):
    """How prompts are fine-tuned. The options of the sampler become the style's own defaults."""

    steps: Annotated[int, "Optimiser steps.", Range(1)] = 24
    batch: Annotated[int, "Pictures that are painted in a step.", Range(2)] = 4
    """The style loss compares distributions, which one picture has not."""
    lr: Annotated[float, "Learning rate at the start, relative to the prompts' size.", Range(0, above=True)] = 0.03
    """In root mean squares of the prompts; it falls to zero by half a cosine."""
    size: Annotated[int, "Side of a picture that is painted, in pixels.", Range(64)] = 256
    strength: Annotated[float, "Strength that the style is for.", Range(0, 1, above=True)] = 0.35
    guidance: Annotated[float, "Guidance that the style is for.", Range(1)] = 6.0
    palette: Annotated[float, "Palette that the style is for.", Range(0, 1)] = 0.8
    content_weight: Annotated[float, "Weight of the loss of content.", Range(0)] = 9.0
    mixed_precision: Annotated[
        Literal["auto", "no", "bf16"], "Autocast of the networks; auto: bf16 where the hardware has it."
    ] = "auto"
    seed: Annotated[int, "Seed of all random numbers.", Range(0)] = 0
    evaluate_every: Annotated[int, Range(1)] = 8
    """Steps between two evaluations on held-out pictures."""
    checkpoint_minutes: Annotated[float, Range(0, above=True)] = field(default=2.0, compare=False)
    """Minutes between two checkpoints."""


@dataclass(frozen=True)
class DistillOptions(RunOptions):
    """How guidance is distilled into a style."""

    guidance: Annotated[float, "Guidance that one pass shall give.", Range(0, 100, above=True)]
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

    def conflicts(self) -> list[str]:
        """See `RunOptions`."""
        return ["guidance: found 1, which takes one pass already; expected another"] if self.guidance == 1 else []
