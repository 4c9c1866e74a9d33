"""What torch computes for a base, with one of its networks in memory at a time.

ControlNet's residuals do not depend on the U-Net of the same step. So all cases go in lockstep: ControlNet answers for
every case, makes room, the U-Net answers for every case, and the next step of all loops begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsast_engines.diffusion.noise_schedule import NoiseSchedule
from lsast_engines.diffusion.solvers import make_solver
from lsast_engines.diffusion.timesteps import Step, TimestepSchedule
from lsast_train.base.attention import GROUPS
from lsast_train.base.base import Base, BaseFacts, BaseParts

from ..graphs.meta_base import skeleton
from ..progress import Countdown, Progress

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of input shapes."""

    batch: int
    rows: int
    """Guidance rows G."""
    height: int
    """In units of the base's smallest legal size."""
    width: int
    loop: bool = False
    """Whether a whole guided run is compared (two rows), not just one step."""


@dataclass(frozen=True)
class Loop:
    """A guided run."""

    steps: int = 5
    """Points of the schedule."""
    strength: float = 0.8
    guidance: float = 3.0
    solver: str = "ddim"
    stages: int = 10
    """Stages of its random style."""

    def schedule(self, noise: NoiseSchedule) -> TimestepSchedule:
        """The steps of the run."""
        return TimestepSchedule.build(noise, self.steps, self.strength, self.stages, self.solver)


class LoopRun:
    """A run under way; who computes eps does not matter to it."""

    def __init__(self, loop: Loop, noise: NoiseSchedule, z0: Array, drawn: Array) -> None:
        self._guidance = loop.guidance
        self._schedule = loop.schedule(noise)
        self._solver = make_solver(loop.solver, noise, self._schedule)
        self._done = 0
        self.latent: Array = self._schedule.add_noise(z0, drawn, self._schedule.start_t)
        """[B, 4, h, w]: where the run stands."""

    @property
    def step(self) -> Step | None:
        """The step to take next; None at the end."""
        return self._schedule.steps[self._done] if self._done < len(self._schedule.steps) else None

    def advance(self, eps: Array) -> None:
        """Take the step with eps [2, B, 4, h, w]."""
        unconditional, conditional = eps
        guided = unconditional + self._guidance * (conditional - unconditional)
        self.latent = self._solver.step(guided, self._done, self.latent).astype(np.float32)
        self._done += 1


@dataclass(frozen=True, eq=False)
class Inputs:
    """Random inputs of one case."""

    case: Case
    image: Array
    """[B, 3, H, W] in [-1, 1]."""
    edges: Array
    """[B, 3, H, W] of 0 and 1."""
    control_scale: np.float32
    contexts: torch.Tensor
    """[stages, G, B, 3, tokens, dim]; rows of a batch may be of different styles."""
    posterior: Array
    """[B, 4, h, w]: the noise that samples the autoencoder's posterior."""
    noise: Array
    """[B, 4, h, w]: what the run starts from, and a latent for the decoder."""
    timestep: int
    """Of the single step of a case without a loop."""
    stage: int


@dataclass(eq=False)
class Expected:
    """What torch gives for one case."""

    mean: Array
    std: Array
    image: Array
    """The decoded noise."""
    hint: Array
    eps: Array
    """Of the single step, or of the first step of the loop: [G, B, 4, h, w]."""
    latent: Array
    """Where that step was taken, [B, 4, h, w]."""
    timestep: int
    stage: int
    residuals: list[Array]
    """The ControlNet's of that step, scaled, the middle block's last."""
    loop_end: Array | None = None
    """The latent that the loop ends with."""


def draw_inputs(
    case: Case, loop: Loop, facts: BaseFacts, context_dim: int, cell: int, generator: np.random.Generator
) -> Inputs:
    """Inputs for `case`; `cell` is the number of latent cells along a side of the smallest legal picture."""
    height, width = case.height * facts.multiple, case.width * facts.multiple
    latent = (case.batch, 4, case.height * cell, case.width * cell)
    edges = generator.random((case.batch, 1, height, width)) < 0.1
    contexts = (loop.stages, case.rows, case.batch, len(GROUPS), facts.tokens, context_dim)
    return Inputs(
        case,
        generator.uniform(-1, 1, (case.batch, 3, height, width)).astype(np.float32),
        edges.repeat(3, axis=1).astype(np.float32),
        np.float32(generator.uniform(0.5, 1.5)),
        torch.from_numpy(generator.standard_normal(contexts, dtype=np.float32)),
        generator.standard_normal(latent, dtype=np.float32),
        generator.standard_normal(latent, dtype=np.float32),
        int(generator.integers(facts.noise.train_steps)),
        int(generator.integers(loop.stages)),
    )


def start_of(loop: Loop, facts: BaseFacts, drawn: Inputs, expected: Expected) -> LoopRun:
    """The run of a case, from torch's posterior on either side."""
    z0 = np.float32(facts.latent_scale) * (expected.mean + expected.std * drawn.posterior)
    return LoopRun(loop, facts.noise, z0, drawn.noise)


def run_torch(parts: BaseParts, inputs: Sequence[Inputs], loop: Loop, progress: Progress) -> list[Expected]:
    """Torch's answers for all `inputs`, in float32."""
    base = skeleton(parts)
    phase = "computing in torch"
    progress(phase)
    with torch.no_grad():
        with loaded(base, parts, "autoencoder"):
            expected = [_autoencode(base, drawn) for drawn in inputs]
        pairs = list(zip(inputs, expected, strict=True))
        runs = [start_of(loop, parts.facts, drawn, e) if drawn.case.loop else None for drawn, e in pairs]
        countdown = Countdown(progress, phase, len(loop.schedule(parts.facts.noise).steps))
        first = True
        while questions := _questions(inputs, runs, first):
            with loaded(base, parts, "controlnet"):
                if first:
                    for drawn, answer in pairs:
                        edges = torch.from_numpy(drawn.edges)
                        answer.hint = base.controlnet.controlnet_cond_embedding(edges).numpy()
                residuals = [_control(base, question) for question in questions]
            if first:
                for question, found in zip(questions, residuals, strict=True):
                    _note_step(expected[question.index], question, found)
            with loaded(base, parts, "unet"):
                for question in questions:
                    eps = _eps(base, question, residuals.pop(0))
                    if first:
                        expected[question.index].eps = eps
                    if (run := runs[question.index]) is not None:
                        run.advance(eps)
            first = False
            countdown.step()
    for answer, run in zip(expected, runs, strict=True):
        answer.loop_end = None if run is None else run.latent
    return expected


@contextlib.contextmanager
def loaded(base: Base, parts: BaseParts, name: str) -> Iterator[None]:
    """Give the network `name` of a skeleton its weights, in float32, as long as the block runs."""
    network = getattr(base, name)
    tensors = parts.networks[name]().tensors
    state = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    network.load_state_dict(state, assign=True)
    del state, tensors
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.to("meta")


@dataclass(frozen=True, eq=False)
class _Question:
    """One evaluation of ControlNet and U-Net."""

    index: int
    """Whose it is, among all inputs."""
    drawn: Inputs
    latent: torch.Tensor
    timestep: torch.Tensor
    stage: int
    contexts: torch.Tensor
    """[G, B, 3, tokens, dim]"""


def _questions(inputs: Sequence[Inputs], runs: Sequence[LoopRun | None], first: bool) -> list[_Question]:
    """The next step of every run that has one; at first the single steps of the others too."""
    questions = []
    for index, (drawn, run) in enumerate(zip(inputs, runs, strict=True)):
        if run is not None and run.step is not None:
            latent, t, stage = run.latent, run.step.t, run.step.stage
        elif run is None and first:
            latent, t, stage = drawn.noise, drawn.timestep, drawn.stage
        else:
            continue
        timestep = torch.full((drawn.case.batch,), t)
        questions.append(_Question(index, drawn, torch.from_numpy(latent), timestep, stage, drawn.contexts[stage]))
    return questions


def _autoencode(base: Base, drawn: Inputs) -> Expected:
    mean, std = (tensor.numpy() for tensor in base.encode(torch.from_numpy(drawn.image)))
    nothing = np.zeros(0, np.float32)
    return Expected(
        mean,
        std,
        image=base.decode(torch.from_numpy(drawn.noise)).numpy(),
        hint=nothing,
        eps=nothing,
        latent=nothing,
        timestep=0,
        stage=0,
        residuals=[],
    )


def _note_step(expected: Expected, question: _Question, residuals: Sequence[torch.Tensor]) -> None:
    """Keep what the single or first step began with, and what the ControlNet gave."""
    expected.latent = question.latent.numpy().copy()
    expected.timestep, expected.stage = int(question.timestep[0]), question.stage
    expected.residuals = [residual.numpy() for residual in residuals]


def _control(base: Base, question: _Question) -> list[torch.Tensor]:
    """ControlNet's residuals: always on the style, never on the null context; scaled."""
    base.control_box.fill(question.contexts[-1])
    down, mid = base.controlnet(
        question.latent,
        question.timestep,
        base.control_box.down,
        torch.from_numpy(question.drawn.edges),
        return_dict=False,
    )
    scale = float(question.drawn.control_scale)
    return [scale * residual for residual in (*down, mid)]


def _eps(base: Base, question: _Question, residuals: Sequence[torch.Tensor]) -> Array:
    """[G, B, 4, h, w]: one pass for each guidance row."""
    *down, mid = residuals
    rows: list[Any] = []
    for contexts in question.contexts:
        base.unet_box.fill(contexts)
        output = base.unet(
            question.latent,
            question.timestep,
            base.unet_box.down,
            down_block_additional_residuals=list(down),
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        rows.append(base.eps_from_output(output, question.latent, question.timestep))
    stacked: Array = torch.stack(rows).numpy()
    return stacked
