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

from lsast_engines.diffusion.noise_schedule import NoiseSchedule
from lsast_engines.diffusion.solvers import Step, TimestepSchedule, make_solver
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


class LoopRun:
    """The state of a run; eps comes from torch or from an exported graph."""

    def __init__(self, loop: Loop, noise: NoiseSchedule, z0: Array, drawn: Array) -> None:
        self._guidance = loop.guidance
        self._schedule = loop.schedule(noise)
        self._solver = make_solver(self._schedule)
        self._done = 0
        self.latent: Array = self._schedule.add_noise(z0, drawn)
        """[B, 4, h, w]: the latent of the next step."""

    @property
    def step(self) -> Step | None:
        """The next step; None at the end."""
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
    """The latent that the loop ends with."""


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


def initial_run(loop: Loop, config: BaseConfig, drawn: Inputs, mean: Array, std: Array) -> LoopRun:
    """The run of a case that begins at a sample of torch's posterior."""
    z0 = np.float32(config.latent_scale) * (mean + std * drawn.posterior)
    return LoopRun(loop, config.noise, z0, drawn.noise)


def run_torch(base: LazyBase, inputs: Sequence[Inputs], loop: Loop, progress: Progress) -> list[Expected]:
    """What torch computes for all `inputs`, in float32."""
    phase = "computing in torch"
    progress(phase)
    eta = Eta(progress, phase, len(loop.schedule(base.config.noise).steps))
    networks = base_on_meta(base)
    with torch.no_grad():
        with loaded(networks, base, "autoencoder"):
            autoencoded = [_autoencode(networks, drawn) for drawn in inputs]
        runs = [
            initial_run(loop, base.config, drawn, mean, std) if drawn.case.loop else None
            for drawn, (mean, std, _) in zip(inputs, autoencoded, strict=True)
        ]
        steps = [_next_step(drawn, run) for drawn, run in zip(inputs, runs, strict=True)]
        outputs: list[tuple[Array, list[torch.Tensor], Array]] = []  # hint, residuals, eps of the first step
        first = list(steps)
        while any(steps):
            with loaded(networks, base, "controlnet"):
                residuals = [None if step is None else step.control(networks) for step in steps]
                if not outputs:
                    embed = networks.controlnet.controlnet_cond_embedding
                    hints = [embed(torch.from_numpy(drawn.edges)).numpy() for drawn in inputs]
            with loaded(networks, base, "unet"):
                eps = [
                    None if step is None or added is None else step.eps(networks, added)
                    for step, added in zip(steps, residuals, strict=True)
                ]
            outputs = outputs or list(zip(hints, residuals, eps, strict=True))  # type: ignore[arg-type]
            for run, found in zip(runs, eps, strict=True):
                if run is not None and found is not None:
                    run.advance(found)
            steps = [None if run is None else _next_step(drawn, run) for drawn, run in zip(inputs, runs, strict=True)]
            eta.step()
    return [
        Expected(
            *posterior_and_image,
            hint=hint,
            eps=eps,
            latent=step.latent.numpy(),
            timestep=int(step.timestep[0]),
            stage=step.stage,
            residuals=[residual.numpy() for residual in residuals],
            loop_end=None if run is None else run.latent,
        )
        for posterior_and_image, (hint, residuals, eps), step, run in zip(
            autoencoded, outputs, first, runs, strict=True
        )
        if step is not None
    ]


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


@dataclass(frozen=True, eq=False)
class _StepInputs:
    """Inputs of ControlNet and U-Net in one step of a case."""

    drawn: Inputs
    latent: torch.Tensor
    timestep: torch.Tensor
    stage: int

    def control(self, networks: Base) -> list[torch.Tensor]:
        """ControlNet's scaled residuals, on the style's contexts: it never reads the null context."""
        down, mid = networks.controlnet(
            self.latent,
            self.timestep,
            None,
            torch.from_numpy(self.drawn.edges),
            cross_attention_kwargs=layer_contexts(self.drawn.contexts[self.stage, -1]),
            return_dict=False,
        )
        return [float(self.drawn.control_scale) * residual for residual in (*down, mid)]

    def eps(self, networks: Base, residuals: Sequence[torch.Tensor]) -> Array:
        """[G, B, 4, h, w]: one pass for each guidance row."""
        *down, mid = residuals
        rows: list[Any] = []
        for contexts in self.drawn.contexts[self.stage]:
            output = networks.unet(
                self.latent,
                self.timestep,
                None,
                cross_attention_kwargs=layer_contexts(contexts),
                down_block_additional_residuals=list(down),
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0]
            rows.append(networks.eps_from_output(output, self.latent, self.timestep))
        stacked: Array = torch.stack(rows).numpy()
        return stacked


def _next_step(drawn: Inputs, run: LoopRun | None) -> _StepInputs | None:
    """The next step of a run, None at its end; without a run, the single step of the case."""
    if run is None:
        latent, t, stage = drawn.noise, drawn.timestep, drawn.stage
    elif run.step is None:
        return None
    else:
        latent, t, stage = run.latent, run.step.t, run.step.stage
    # A copy: the run may write to its latent.
    return _StepInputs(drawn, torch.from_numpy(latent.copy()), torch.full((drawn.case.batch,), t), stage)
