"""The teacher of a distillation: latents on its trajectories, and the noise that the student shall predict there.

It paints with guidance, ε = ε_null + g (ε_style - ε_null), and the latents of its steps are kept with their ε: the
student will be used at latents of guided paintings, which differ from noised pictures (adapter guidance distillation,
AGD, trains on guided trajectories for that reason). The timesteps of every run are shifted by a random part of its
stride, so that all runs together have all timesteps. Some noised pictures are mixed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lsast_engines.bundle.style import Style
from lsast_engines.diffusion import Step, TimestepSchedule, guide, make_solver

from ..base.attention import packed_kv
from ..base.base import Base
from ..options import DistillOptions
from ..paintings import Painting, encode_pictures, random_crop, sample_posterior, shows_bars, to_edges
from ..training.rng import RngStream, rng_for

BATCH = 8
"""Pictures that the teacher paints at once, at 256 pixels; fewer of larger ones."""


class Contents(NamedTuple):
    """Pictures as latents [P, 4, h, w], and their edges [P, 3, 8h, 8w] of 0 and 1; on the CPU."""

    latents: torch.Tensor
    edges: torch.Tensor


@dataclass(frozen=True, eq=False)
class TeacherSamples:
    """Latents, and the noise that the student shall predict in them; on the CPU, float32."""

    picture: torch.Tensor
    """[N] int64: its row in the `Contents`."""
    timestep: torch.Tensor
    """[N] int64."""
    stage: torch.Tensor
    """[N] int64."""
    latent: torch.Tensor
    """[N, 4, h, w]."""
    target: torch.Tensor
    """[N, 4, h, w]: ε that the student shall predict."""
    unguided: torch.Tensor
    """[N, 4, h, w]: ε of one pass of the original style, to which errors are relative."""
    edges: torch.Tensor
    """[P, 3, 8h, 8w] of all pictures."""

    def like(self, other: TeacherSamples) -> TeacherSamples:
        """The first samples of each stage, as many as `other` has."""
        counts = torch.bincount(other.stage)
        rows = torch.cat([self.rows(stage)[:count] for stage, count in enumerate(counts.tolist())])
        chosen = {entry.name: getattr(self, entry.name)[rows] for entry in fields(self) if entry.name != "edges"}
        return replace(self, **chosen)

    def rows(self, stage: int) -> torch.Tensor:
        """Indices of the samples of a stage."""
        return (self.stage == stage).nonzero().flatten()

    def distance(self, stages: list[int]) -> list[float]:
        """Root mean square of unguided - target in each stage."""
        error = (self.unguided - self.target).double().square().mean((1, 2, 3))
        return [error[self.rows(stage)].mean().sqrt().item() for stage in stages]


def read_contents(base: Base, paintings: Sequence[Painting], count: int, size: int, seed: int, split: int) -> Contents:
    """Latents and edges of `count` random crops, of one painting after the other."""
    latents, edges = [], []
    for index in range(count):
        generator = rng_for(seed, RngStream.CONTENT, split, index)
        pixels = random_crop(paintings[index % len(paintings)], size, generator)
        edges.append(to_edges(torch.tensor(pixels)[None]))
        latents.append(sample_posterior(base, *encode_pictures(base, [pixels]), generator).cpu())
    return Contents(torch.cat(latents), torch.cat(edges))


class Teacher:
    """The frozen base with guidance; `null` are the keys and values [T, Wu] of the null context."""

    def __init__(self, base: Base, style: Style, null: torch.Tensor, options: DistillOptions) -> None:
        self.base, self.options, self.noise, self.stages = base, options, base.config.noise, style.stages
        self._rows = [torch.from_numpy(rows).to(base.device) for rows in (style.kv_unet, style.kv_control)]
        self._null = null.to(base.device)

    def samples(self, contents: Contents, split: int, noised: int) -> TeacherSamples:
        """All steps of the guided paintings of `contents`, and `noised` samples of each stage that are noised pictures.

        Training (`split` 0) and evaluation (1) have random numbers of their own.
        """
        points = [*self._painted(contents, split), *self._noised(contents, split, noised)]
        picture, timestep, latent, guided, plain = map(torch.cat, zip(*points, strict=True))
        stage = timestep * self.stages // self.noise.train_steps
        return TeacherSamples(picture, timestep, stage, latent, guided, plain, contents.edges)

    @torch.no_grad()
    def _point(
        self, contents: Contents, picture: torch.Tensor, timestep: torch.Tensor, latent: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Pictures, timesteps, latents, and guided and unguided noise there; the timesteps are all of one stage.

        ControlNet runs once, with the style, and its residuals serve both passes, as in the runtime.
        """
        base = self.base
        x, time, edges = (part.to(base.device) for part in (latent, timestep, contents.edges[picture]))
        unet, control = (rows[int(timestep[0]) * self.stages // self.noise.train_steps] for rows in self._rows)
        style, null, controls = (packed_kv(rows.expand(len(x), -1, -1)) for rows in (unet, self._null, control))
        residuals = base.control(x, time, controls, edges, self.options.control_scale)
        cond, uncond = (base.eps(x, time, kv, residuals=residuals) for kv in (style, null))
        return picture, timestep, latent, guide((uncond, cond), self.options.guidance).cpu(), cond.cpu()

    def _painted(self, contents: Contents, split: int) -> Iterator[tuple[torch.Tensor, ...]]:
        options = self.options
        whole = TimestepSchedule.build(self.noise, options.teacher_steps, options.strength, self.stages, options.solver)
        batches = torch.arange(len(contents.latents)).split(_at_once(contents))
        bar = tqdm(batches, desc=("teacher", "held out")[split], unit="batch", disable=not shows_bars())
        for number, picture in enumerate(bar):
            generator = rng_for(options.seed, RngStream.TEACHER, split, number)
            schedule = jitter_timesteps(whole, float(torch.rand((), generator=generator)), self.stages)
            solver = make_solver(schedule)
            z0 = contents.latents[picture]
            drawn = torch.randn(z0.shape, generator=generator)
            latent = torch.from_numpy(schedule.add_noise(z0.numpy(), drawn.numpy()))
            for step in schedule.steps:
                point = self._point(contents, picture, torch.full((len(latent),), step.t), latent)
                yield point
                moved: Any = solver.step(point[3].numpy(), step.index, latent.numpy())
                latent = torch.from_numpy(moved.astype(np.float32))

    def _noised(self, contents: Contents, split: int, count: int) -> Iterator[tuple[torch.Tensor, ...]]:
        length = self.noise.train_steps / self.stages
        for stage in range(self.stages if count else 0):
            generator = rng_for(self.options.seed, RngStream.TEACHER_NOISED, split, stage)
            low, high = math.ceil(stage * length), math.ceil((stage + 1) * length)
            pictures = torch.randint(len(contents.latents), (count,), generator=generator)
            for picture in pictures.split(_at_once(contents)):
                timestep = torch.randint(low, high, picture.shape, generator=generator)
                drawn = torch.randn(contents.latents[picture].shape, generator=generator)
                inputs = (x.to(self.base.device) for x in (contents.latents[picture], drawn, timestep))
                yield self._point(contents, picture, timestep, self.base.add_noise(*inputs).cpu())


def jitter_timesteps(schedule: TimestepSchedule, part: float, stages: int) -> TimestepSchedule:
    """`schedule` with all timesteps lowered by `part` (0 to 1) of its stride, or of the last one if that is less."""
    steps, noise = schedule.steps, schedule.noise
    stride = steps[-2].t - steps[-1].t if len(steps) > 1 else steps[-1].t
    down = int(part * min(stride, steps[-1].t))
    moved = (Step(step.index, step.t - down, (step.t - down) * stages // noise.train_steps) for step in steps)
    return TimestepSchedule(noise, schedule.solver, tuple(moved), schedule.start_t - down)


def _at_once(contents: Contents) -> int:
    return max(1, BATCH * 1024 // contents.latents[0, 0].numel())
