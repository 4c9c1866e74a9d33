"""The teacher of a distillation: latents on its trajectories, and the noise that the student shall predict there.

The teacher paints with guidance, ε = ε_null + g (ε_style - ε_null), two passes a step, and the latents of its steps are
kept with their ε: the student will be used at latents of guided paintings, which differ from noised pictures (adapter
guidance distillation, AGD, trains on guided trajectories for that reason). The timesteps of every run are shifted by a
random part of its stride, so that all runs together have all timesteps. Some noised pictures are mixed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from lsast_engines.bundle.style import Style
from lsast_engines.diffusion import NoiseSchedule, Step, TimestepSchedule, guide, make_solver
from lsast_engines.images import canny_edges

from ..base.attention import packed_kv
from ..base.base import Base
from ..paintings import Painting, encode_pictures, random_crop, sample_posterior
from ..training.rng import RngStream, rng_for
from .options import DistillOptions

BATCH = 8
"""Pictures that the teacher paints at once, at 256 pixels; fewer of larger ones."""


@dataclass(frozen=True, eq=False)
class TeacherSamples:
    """Latents, and the noise that the student shall predict in them; on the CPU, float32."""

    picture: torch.Tensor
    """[N] int64: its row in the `ContentBatch`."""
    timestep: torch.Tensor
    """[N] int64."""
    stage: torch.Tensor
    """[N] int64."""
    latent: torch.Tensor
    """[N, 4, h, w]"""
    target: torch.Tensor
    """[N, 4, h, w]: ε that the student shall predict."""
    unguided: torch.Tensor
    """[N, 4, h, w]: ε of one pass of the original style, to which errors are relative."""

    @classmethod
    def join(cls, parts: list[TeacherSamples]) -> TeacherSamples:
        """The samples of all `parts`."""
        names = cls.__dataclass_fields__
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def like(self, other: TeacherSamples) -> TeacherSamples:
        """The first samples of each stage, as many as `other` has."""
        counts = torch.bincount(other.stage)
        rows = torch.cat([self.rows(stage)[:count] for stage, count in enumerate(counts.tolist())])
        return TeacherSamples(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def rows(self, stage: int) -> torch.Tensor:
        """Indices of the samples of a stage."""
        return (self.stage == stage).nonzero().flatten()

    def distance(self, stages: list[int]) -> tuple[float, ...]:
        """Root mean square of unguided - target in each stage."""
        return tuple(
            (self.unguided[rows] - self.target[rows]).double().square().mean().sqrt().item()
            for rows in map(self.rows, stages)
        )


@dataclass(frozen=True, eq=False)
class ContentBatch:
    """Pictures as latents and edges; on the CPU."""

    latents: torch.Tensor
    """[P, 4, h, w]"""
    edges: torch.Tensor
    """[P, 3, 8h, 8w] of 0 and 1."""


Samples: TypeAlias = tuple[ContentBatch, TeacherSamples]
"""Pictures, and the teacher's samples on the way to their paintings."""


def read_content(
    base: Base, paintings: Sequence[Painting], count: int, size: int, seed: int, split: int
) -> ContentBatch:
    """Latents and edges of `count` random crops, of one painting after the other."""
    latents, edges = [], []
    for index in range(count):
        generator = rng_for(seed, RngStream.CONTENT, split, index)
        pixels = random_crop(paintings[index % len(paintings)], size, generator)
        edges.append(torch.from_numpy(canny_edges(pixels)).float().expand(1, 3, -1, -1))
        latents.append(sample_posterior(base, *encode_pictures(base, [pixels]), generator).cpu())
    return ContentBatch(torch.cat(latents), torch.cat(edges))


def control_residuals(
    base: Base, latent: torch.Tensor, timestep: torch.Tensor, kv: torch.Tensor, edges: torch.Tensor, scale: float
) -> dict[str, Any]:
    """ControlNet's residuals for `predict`, times `scale`; keys and values [T, Wc] are the same for all rows."""
    return base.control(latent, timestep, packed_kv(kv.expand(len(latent), -1, -1)), edges, scale)


def predict(
    base: Base, latent: torch.Tensor, timestep: torch.Tensor, kv: torch.Tensor, residuals: dict[str, Any]
) -> torch.Tensor:
    """Predicted noise [B, 4, h, w]; keys and values [T, Wu] are the same for all rows."""
    return base.eps(latent, timestep, packed_kv(kv.expand(len(latent), -1, -1)), residuals=residuals)


class Teacher:
    """The frozen base with guidance.

    Args:
        null: keys and values [T, Wu] of the null context.
        options: guidance, control, schedule.
    """

    def __init__(self, base: Base, style: Style, null: torch.Tensor, options: DistillOptions) -> None:
        self.base, self.options, self.noise, self.stages = base, options, base.config.noise, style.stages
        self._rows = [torch.from_numpy(rows).to(base.device) for rows in (style.kv_unet, style.kv_control)]
        self._null = null.to(base.device)

    @torch.no_grad()
    def __call__(
        self, latent: torch.Tensor, timestep: torch.Tensor, edges: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guided and unguided noise, [B, 4, h, w] each, of latents whose timesteps [B] are all of one stage.

        ControlNet runs once, with the style, and its residuals serve both passes, as in the runtime.
        """
        base = self.base
        latent, timestep, edges = (x.to(base.device) for x in (latent, timestep, edges))
        stage = stage_of(int(timestep[0]), self.noise, self.stages)
        unet, control = (rows[stage] for rows in self._rows)
        residuals = control_residuals(base, latent, timestep, control, edges, self.options.control_scale)
        plain, null = (predict(base, latent, timestep, kv, residuals) for kv in (unet, self._null))
        return guide((null, plain), self.options.guidance).cpu(), plain.cpu()

    def trajectory_samples(self, content: ContentBatch, seed: tuple[int, ...]) -> Iterator[TeacherSamples]:
        """Paint every picture with guidance; the samples of each step, batch by batch."""
        options = self.options
        for number, picture in _batches(content):
            generator = rng_for(options.seed, RngStream.TEACHER, *seed, number)
            layout = TimestepSchedule.build(
                self.noise, options.teacher_steps, options.strength, self.stages, options.solver
            )
            schedule = jitter_timesteps(layout, float(torch.rand((), generator=generator)), self.stages)
            solver = make_solver(schedule)
            z0 = content.latents[picture]
            drawn = torch.randn(z0.shape, generator=generator)
            latent = torch.from_numpy(schedule.add_noise(z0.numpy(), drawn.numpy()))
            for step in schedule.steps:
                timestep = torch.full((len(latent),), step.t)
                guided, plain = self(latent, timestep, content.edges[picture])
                stage = torch.full_like(timestep, step.stage)
                yield TeacherSamples(picture, timestep, stage, latent, guided, plain)
                moved: Any = solver.step(guided.numpy(), step.index, latent.numpy())
                latent = torch.from_numpy(moved.astype(np.float32))

    def noised(self, content: ContentBatch, count: int, seed: tuple[int, ...]) -> Iterator[TeacherSamples]:
        """Noised pictures: `count` samples in every stage, at random timesteps of it."""
        length = self.noise.train_steps / self.stages
        for stage in range(self.stages):
            generator = rng_for(self.options.seed, RngStream.TEACHER_NOISED, *seed, stage)
            low, high = math.ceil(stage * length), math.ceil((stage + 1) * length)
            for picture in torch.randint(len(content.latents), (count,), generator=generator).split(_at_once(content)):
                timestep = torch.randint(low, high, picture.shape, generator=generator)
                drawn = torch.randn(content.latents[picture].shape, generator=generator)
                inputs = (x.to(self.base.device) for x in (content.latents[picture], drawn, timestep))
                latent = self.base.add_noise(*inputs).cpu()
                guided, plain = self(latent, timestep, content.edges[picture])
                yield TeacherSamples(picture, timestep, torch.full_like(timestep, stage), latent, guided, plain)

    def samples(self, content: ContentBatch, *seed: int, noised: int) -> Iterator[TeacherSamples]:
        """All samples for the options, of `content`; `seed` is another one for training and evaluation."""
        yield from self.trajectory_samples(content, seed)
        if noised:
            yield from self.noised(content, noised, seed)


def stage_of(t: int, noise: NoiseSchedule, stages: int) -> int:
    """The stage of a timestep, as `lsast_engines.diffusion.Step` has it."""
    return t * stages // noise.train_steps


def jitter_timesteps(schedule: TimestepSchedule, part: float, stages: int) -> TimestepSchedule:
    """`schedule` with all timesteps lowered by `part` (0 to 1) of its stride, or of the last one if that is less."""
    steps = schedule.steps
    stride = steps[-2].t - steps[-1].t if len(steps) > 1 else steps[-1].t
    down = int(part * min(stride, steps[-1].t))
    times = [step.t - down for step in steps]
    moved = tuple(Step(index, t, stage_of(t, schedule.noise, stages)) for index, t in enumerate(times))
    return TimestepSchedule(schedule.noise, schedule.solver, moved, schedule.start_t - down)


def _at_once(content: ContentBatch) -> int:
    return max(1, BATCH * 1024 // content.latents[0, 0].numel())


def _batches(content: ContentBatch) -> Iterator[tuple[int, torch.Tensor]]:
    yield from enumerate(torch.arange(len(content.latents)).split(_at_once(content)))
