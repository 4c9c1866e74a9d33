"""What torch computes for a base, with one of its networks in memory at a time.

ControlNet's residuals do not depend on the U-Net of the same step. So all cases advance together: ControlNet runs for
every case, is freed, the U-Net runs for every case, and the next step of all loops begins.

This module is the reference of every export: it denoises in a loop of its own, with diffusers'
networks under the trainer's attention processor and the runtime's solvers, which tests compare with diffusers'.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsast_engines.diffusion import NoiseSchedule, Step, TimestepSchedule, make_solver
from lsast_train.base.base import Base, BaseConfig
from lsast_train.base.lazy_base import LazyBase
from lsast_train.base.projection import GROUPS

from ..graphs.modules import base_on_meta, geometry
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


@dataclass(eq=False)
class Expected:
    """What torch computes for one case."""

    mean: Array
    std: Array
    image: Array
    """The decoded noise."""
    hint: Array = field(init=False)
    residuals: list[Array] = field(init=False)
    """The ControlNet's of the first step, scaled, the middle block's last."""
    eps: Array = field(init=False)
    """Of the first step, [G, B, 4, h, w]."""
    loop_end: Array = field(init=False)
    """The latent that a loop ends with."""


class Run:
    """The steps of a case, with eps from torch or from an exported graph: a guided loop, or a single step."""

    def __init__(self, loop: Loop, config: BaseConfig, drawn: Inputs, expected: Expected) -> None:
        """Begin a loop at a sample of torch's posterior, a single step at the drawn noise."""
        self._drawn, self._guidance = drawn, loop.guidance
        self._solver: Any = None
        self._steps: tuple[Step, ...] = (Step(0, drawn.timestep, drawn.stage),)
        self._done = 0
        self.latent: Array = drawn.noise
        """[B, 4, h, w]: the latent of the next step."""
        if drawn.case.loop:
            schedule = loop.schedule(config.noise)
            self._solver, self._steps = make_solver(schedule), schedule.steps
            z0 = np.float32(config.latent_scale) * (expected.mean + expected.std * drawn.posterior)
            self.latent = schedule.add_noise(z0, drawn.noise)

    @property
    def step(self) -> Step | None:
        """The next step; None at the end."""
        return self._steps[self._done] if self._done < len(self._steps) else None

    def inputs(self) -> tuple[Array, npt.NDArray[np.int64], torch.Tensor]:
        """Of the next step: latent, timestep [B], and the contexts [G, B, 3, tokens, dim] of its stage."""
        step = self._steps[self._done]
        # The run may write to its latent.
        return self.latent.copy(), np.full(len(self.latent), step.t, np.int64), self._drawn.contexts[step.stage]

    def advance(self, eps: Array) -> None:
        """Take the step with eps [G, B, 4, h, w]; a loop has two rows."""
        if self._solver is not None:
            unconditional, conditional = eps
            guided = unconditional + self._guidance * (conditional - unconditional)
            self.latent = self._solver.step(guided, self._done, self.latent).astype(np.float32)
        self._done += 1


def draw_inputs(case: Case, loop: Loop, networks: Base, generator: np.random.Generator) -> Inputs:
    """Inputs of `networks`, which may be on the meta device, for `case`."""
    config = networks.config
    cell = config.multiple // geometry(networks).factor
    height, width = case.height * config.multiple, case.width * config.multiple
    latent = (case.batch, 4, case.height * cell, case.width * cell)
    edges = generator.random((case.batch, 1, height, width)) < 0.1
    contexts = (loop.stages, case.rows, case.batch, len(GROUPS), config.tokens, networks.context_dim)
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


@torch.no_grad()
def run_torch(base: LazyBase, inputs: Sequence[Inputs], loop: Loop, progress: Progress) -> list[Expected]:
    """What torch computes for all `inputs`, in float32."""
    phase = "computing in torch"
    progress(phase)
    eta = Eta(progress, phase, len(loop.schedule(base.config.noise).steps))
    networks = base_on_meta(base)
    with loaded(networks, base, "autoencoder"):
        answers = []
        for drawn in inputs:
            mean, std = networks.encode(torch.from_numpy(drawn.image))
            image = networks.decode(torch.from_numpy(drawn.noise))
            answers.append(Expected(mean.numpy(), std.numpy(), image.numpy()))
    runs = [Run(loop, base.config, *pair) for pair in zip(inputs, answers, strict=True)]
    first = True
    while going := [each for each in zip(inputs, answers, runs, strict=True) if each[2].step is not None]:
        controls = []
        with loaded(networks, base, "controlnet"):
            for drawn, answer, run in going:
                latent, timestep, contexts = run.inputs()
                edges = torch.from_numpy(drawn.edges)
                at = (torch.from_numpy(latent), torch.from_numpy(timestep))
                # On the style's contexts: ControlNet never reads the null context.
                control = networks.control(*at, contexts[-1], edges, float(drawn.control_scale))
                controls.append((at, contexts, control))
                if first:
                    answer.hint = networks.controlnet.controlnet_cond_embedding(edges).numpy()
                    residuals = (*control["down_block_additional_residuals"], control["mid_block_additional_residual"])
                    answer.residuals = [residual.numpy() for residual in residuals]
        with loaded(networks, base, "unet"):
            for (_, answer, run), (at, contexts, control) in zip(going, controls, strict=True):
                eps = torch.stack([networks.eps(*at, rows, residuals=control) for rows in contexts]).numpy()
                if first:
                    answer.eps = eps
                run.advance(eps)
        first = False
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
