"""What torch computes for a base, with one of its networks in memory at a time.

ControlNet's residuals do not depend on the U-Net of the same step. So all cases advance together: ControlNet runs for
every case, is freed, the U-Net runs for every case, and the next step of all loops begins.

This module is the reference of every export: it denoises in a loop of its own, with stock diffusers networks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsast_engines.diffusion import NoiseSchedule, Step, TimestepSchedule, make_solver
from lsast_train.base.attention import GROUPS, layer_contexts
from lsast_train.base.base import Base, BaseConfig
from lsast_train.base.lazy_base import LazyBase

from ..graphs.modules import base_on_meta
from ..progress import Eta, Progress

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
    """A guided denoising run."""

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


class Run:
    """The steps of a case, with eps from torch or from an exported graph: a guided loop, or a single step."""

    def __init__(self, loop: Loop, config: BaseConfig, drawn: Inputs, mean: Array, std: Array) -> None:
        """Begin a loop at a sample of torch's posterior [B, 4, h, w], a single step at the drawn noise."""
        self._guidance = loop.guidance
        self._solver: Any = None
        self._steps: tuple[Step, ...] = (Step(0, drawn.timestep, drawn.stage),)
        self._done = 0
        self.latent: Array = drawn.noise
        """[B, 4, h, w]: the latent of the next step."""
        if drawn.case.loop:
            schedule = loop.schedule(config.noise)
            self._solver, self._steps = make_solver(schedule), schedule.steps
            z0 = np.float32(config.latent_scale) * (mean + std * drawn.posterior)
            self.latent = schedule.add_noise(z0, drawn.noise)

    @property
    def step(self) -> Step | None:
        """The next step; None at the end."""
        return self._steps[self._done] if self._done < len(self._steps) else None

    def advance(self, eps: Array) -> None:
        """Take the step with eps [G, B, 4, h, w]; a loop has two rows."""
        if self._solver is not None:
            unconditional, conditional = eps
            guided = unconditional + self._guidance * (conditional - unconditional)
            self.latent = self._solver.step(guided, self._done, self.latent).astype(np.float32)
        self._done += 1


@dataclass(eq=False)
class Expected:
    """What torch computes for one case."""

    mean: Array
    std: Array
    image: Array
    """The decoded noise."""
    hint: Array
    eps: Array
    """Of the single step, or of the first step of the loop: [G, B, 4, h, w]."""
    latent: Array
    """The input of that step, [B, 4, h, w]."""
    timestep: int
    stage: int
    residuals: list[Array]
    """The ControlNet's of that step, scaled, the middle block's last."""
    loop_end: Array | None = None
    """The latent that a loop ends with."""


def draw_inputs(
    case: Case, loop: Loop, config: BaseConfig, context_dim: int, cell: int, generator: np.random.Generator
) -> Inputs:
    """Inputs for `case`; `cell` is the number of latent cells along a side of the smallest legal picture."""
    height, width = case.height * config.multiple, case.width * config.multiple
    latent = (case.batch, 4, case.height * cell, case.width * cell)
    edges = generator.random((case.batch, 1, height, width)) < 0.1
    contexts = (loop.stages, case.rows, case.batch, len(GROUPS), config.tokens, context_dim)
    return Inputs(
        case,
        generator.uniform(-1, 1, (case.batch, 3, height, width)).astype(np.float32),
        edges.repeat(3, axis=1).astype(np.float32),
        np.float32(generator.uniform(0.5, 1.5)),
        torch.from_numpy(generator.standard_normal(contexts, dtype=np.float32)),
        generator.standard_normal(latent, dtype=np.float32),
        generator.standard_normal(latent, dtype=np.float32),
        int(generator.integers(config.noise.train_steps)),
        int(generator.integers(loop.stages)),
    )


def run_torch(base: LazyBase, inputs: Sequence[Inputs], loop: Loop, progress: Progress) -> list[Expected]:
    """What torch computes for all `inputs`, in float32."""
    phase = "computing in torch"
    progress(phase)
    eta = Eta(progress, phase, len(loop.schedule(base.config.noise).steps))
    networks = base_on_meta(base)
    answers: list[Expected] = []
    with torch.no_grad():
        with loaded(networks, base, "autoencoder"):
            autoencoded = [_autoencode(networks, drawn) for drawn in inputs]
        runs = [
            Run(loop, base.config, drawn, mean, std) for drawn, (mean, std, _) in zip(inputs, autoencoded, strict=True)
        ]
        while steps := [_StepInputs(drawn, run) for drawn, run in zip(inputs, runs, strict=True) if run.step]:
            with loaded(networks, base, "controlnet"):
                residuals = [step.control(networks) for step in steps]
                embed = networks.controlnet.controlnet_cond_embedding
                hints = [] if answers else [embed(torch.from_numpy(drawn.edges)).numpy() for drawn in inputs]
            with loaded(networks, base, "unet"):
                eps = [step.eps(networks, added) for step, added in zip(steps, residuals, strict=True)]
            answers = answers or [
                Expected(
                    *autoencoded[index],
                    hint=hint,
                    eps=eps[index],
                    latent=steps[index].latent.numpy(),
                    timestep=steps[index].step.t,
                    stage=steps[index].step.stage,
                    residuals=[residual.numpy() for residual in residuals[index]],
                )
                for index, hint in enumerate(hints)
            ]
            for step, found in zip(steps, eps, strict=True):
                step.run.advance(found)
            eta.step()
    for answer, run in zip(answers, runs, strict=True):
        answer.loop_end = run.latent
    return answers


@contextlib.contextmanager
def loaded(networks: Base, base: LazyBase, name: str) -> Iterator[None]:
    """Give the network `name`, which is on the meta device, its weights in float32 while the block runs."""
    network = getattr(networks, name)
    tensors = base.networks[name]().tensors
    state = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    network.load_state_dict(state, assign=True)
    del state, tensors
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.to("meta")


def _autoencode(networks: Base, drawn: Inputs) -> tuple[Array, Array, Array]:
    """Mean and standard deviation of the image's posterior, and the decoded noise."""
    mean, std = networks.encode(torch.from_numpy(drawn.image))
    return mean.numpy(), std.numpy(), networks.decode(torch.from_numpy(drawn.noise)).numpy()


class _StepInputs:
    """The next step of a run: inputs of ControlNet and U-Net."""

    def __init__(self, drawn: Inputs, run: Run) -> None:
        assert run.step is not None, "the run goes on"
        self.run, self.step = run, run.step
        self.latent = torch.from_numpy(run.latent.copy())  # the run may write to its latent
        self._timestep = torch.full((drawn.case.batch,), run.step.t)
        self._contexts = drawn.contexts[run.step.stage]  # [G, B, 3, tokens, dim]
        self._drawn = drawn

    def control(self, networks: Base) -> list[torch.Tensor]:
        """ControlNet's scaled residuals, on the style's contexts: it never reads the null context."""
        down, mid = networks.controlnet(
            self.latent,
            self._timestep,
            None,
            torch.from_numpy(self._drawn.edges),
            cross_attention_kwargs=layer_contexts(self._contexts[-1]),
            return_dict=False,
        )
        return [float(self._drawn.control_scale) * residual for residual in (*down, mid)]

    def eps(self, networks: Base, residuals: Sequence[torch.Tensor]) -> Array:
        """[G, B, 4, h, w]: one pass for each guidance row."""
        *down, mid = residuals
        rows: list[Any] = []
        for contexts in self._contexts:
            output = networks.unet(
                self.latent,
                self._timestep,
                None,
                cross_attention_kwargs=layer_contexts(contexts),
                down_block_additional_residuals=list(down),
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0]
            rows.append(networks.eps_from_output(output, self.latent, self._timestep))
        stacked: Array = torch.stack(rows).numpy()
        return stacked
