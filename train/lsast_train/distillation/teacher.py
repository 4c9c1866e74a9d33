"""What the teacher of a distillation shows: latents on its way, and the noise that the student is to see there.

The teacher paints with guidance, ε = ε_null + g (ε_style - ε_null), two passes a step, and the states it passes are
kept with their ε: the student will be asked at latents of guided paintings, and those differ from noised pictures
(adapter guidance distillation, AGD, trains on guided trajectories for that reason). Every run is shifted by a random
part of its stride, so that runs meet all timesteps. Some pictures noised are mixed in.

For a student of few steps the teacher takes many between two of the student's, and ε is what makes the student's solver
land where the teacher went.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsast_engines.diffusion.guidance import guide
from lsast_engines.diffusion.noise_schedule import NoiseSchedule
from lsast_engines.diffusion.solvers import Solver, make_solver
from lsast_engines.diffusion.timesteps import Step, TimestepSchedule
from lsast_engines.images import canny_edges

from ..base.baked import BakedBase
from ..evaluation import Purpose, seeded
from ..paintings import Painting, view
from .options import DistilOptions
from .source_style import SourceStyle

BATCH = 8
"""Pictures that the teacher paints at once, at 256 pixels; fewer of larger ones."""


@dataclass(frozen=True, eq=False)
class States:
    """Latents, and what is to be seen in them; on the CPU, float32."""

    picture: torch.Tensor
    """[N] int64: row of `Content` that each belongs to."""
    timestep: torch.Tensor
    """[N] int64."""
    stage: torch.Tensor
    """[N] int64."""
    latent: torch.Tensor
    """[N, 4, h, w]"""
    target: torch.Tensor
    """[N, 4, h, w]: ε that the student is to give."""
    unguided: torch.Tensor
    """[N, 4, h, w]: ε that one pass of the original style gives, the yardstick."""

    @classmethod
    def join(cls, parts: list[States]) -> States:
        """All states of several."""
        names = cls.__dataclass_fields__
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def like(self, other: States) -> States:
        """As many states of each stage as `other` has, if there are, the first ones."""
        counts = torch.bincount(other.stage)
        rows = torch.cat([self.rows(stage)[:count] for stage, count in enumerate(counts.tolist())])
        return States(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def rows(self, stage: int) -> torch.Tensor:
        """Numbers of the states of a stage."""
        return (self.stage == stage).nonzero().flatten()

    def distance(self, stages: list[int]) -> tuple[float, ...]:
        """Root mean square of unguided - target in each stage."""
        return tuple(
            (self.unguided[rows] - self.target[rows]).double().square().mean().sqrt().item()
            for rows in map(self.rows, stages)
        )


@dataclass(frozen=True, eq=False)
class Content:
    """Pictures, as the networks know them; on the CPU."""

    latents: torch.Tensor
    """[P, 4, h, w]"""
    hints: torch.Tensor
    """[P, C, h, w]: what ControlNet's hint encoder makes of the edges."""


def read_content(
    baked: BakedBase, paintings: Sequence[Painting], count: int, size: int, seed: int, side: int
) -> Content:
    """Random windows of `paintings`, which take turns: latents and hint features of `count` of them."""
    base, latents, hints = baked.base, [], []
    for index in range(count):
        generator = seeded(seed, Purpose.CONTENT, side, index)
        pixels = view(paintings[index % len(paintings)], size, generator).copy()
        edges = torch.from_numpy(canny_edges(pixels)).float().expand(1, 3, -1, -1).to(baked.base.device)
        with torch.no_grad():
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(baked.base.device).float() / 127.5 - 1
            mean, std = (part.cpu() for part in base.encode(image))
            hints.append(baked.hints(edges).cpu())
        latents.append(base.config.latent_scale * (mean + std * torch.randn(mean.shape, generator=generator)))
    return Content(torch.cat(latents), torch.cat(hints))


class Teacher:
    """The frozen base with guidance.

    Args:
        baked: the base.
        style: the original style.
        null: keys and values [T, Wu] of the null context.
        options: guidance, control, schedule.
    """

    def __init__(self, baked: BakedBase, style: SourceStyle, null: torch.Tensor, options: DistilOptions) -> None:
        self.baked, self.options = baked, options
        self.stages = style.stages
        device = baked.base.device
        self._rows = style.kv_unet.to(device), style.kv_control.to(device)
        self._null = null.to(device)

    @property
    def noise(self) -> NoiseSchedule:
        """The base's noise."""
        return self.baked.base.config.noise

    @torch.no_grad()
    def __call__(
        self, latent: torch.Tensor, timestep: torch.Tensor, hint: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guided and unguided noise, [B, 4, h, w] each, of latents whose timesteps [B] are all of one stage.

        ControlNet is asked once, with the style, and answers for both halves, as in the runtime (docs/method.md §4.5).
        """
        device = self.baked.base.device
        latent, timestep, hint = latent.to(device), timestep.to(device), hint.to(device)
        stage = stage_of(int(timestep[0]), self.noise, self.stages)
        unet, control = (rows[stage] for rows in self._rows)
        residuals = self.baked.residuals(latent, timestep, control, hint, self.options.control)
        plain = self.baked.eps(latent, timestep, unet, residuals)
        null = self.baked.eps(latent, timestep, self._null, residuals)
        return guide((null, plain), self.options.guidance).cpu(), plain.cpu()

    def on_the_way(self, content: Content, seed: tuple[int, ...]) -> Iterator[States]:
        """Paint every picture with guidance; the states of each step, batch by batch."""
        facts, options = self.noise, self.options
        for number, picture in _batches(content):
            generator = seeded(options.seed, Purpose.TEACHER, *seed, number)
            layout = TimestepSchedule.build(facts, options.teacher_steps, options.strength, self.stages, options.solver)
            schedule = shifted(layout, float(torch.rand((), generator=generator)), self.stages)
            solver = make_solver(options.solver, facts, schedule)
            latent = self._start(content, picture, schedule, generator)
            for step in schedule.steps:
                state, guided = self._state(content, picture, latent, step.t)
                yield state
                latent = _advance(solver, guided, step.index, latent)

    def noised(self, content: Content, count: int, seed: tuple[int, ...]) -> Iterator[States]:
        """Pictures noised: `count` states in every stage, at random timesteps of it."""
        length = self.noise.train_steps / self.stages
        for stage in range(self.stages):
            generator = seeded(self.options.seed, Purpose.TEACHER_NOISED, *seed, stage)
            low, high = math.ceil(stage * length), math.ceil((stage + 1) * length)
            for picture in torch.randint(len(content.latents), (count,), generator=generator).split(_at_once(content)):
                timestep = torch.randint(low, high, picture.shape, generator=generator)
                drawn = torch.randn(content.latents[picture].shape, generator=generator)
                abar = self.baked.base.alphas_cumprod.cpu()[timestep].view(-1, 1, 1, 1)
                latent = abar.sqrt() * content.latents[picture] + (1 - abar).sqrt() * drawn
                guided, plain = self(latent, timestep, content.hints[picture])
                yield States(picture, timestep, torch.full_like(timestep, stage), latent, guided, plain)

    def landings(self, content: Content, seed: tuple[int, ...]) -> Iterator[States]:
        """Paint every picture in many steps; the states at the student's steps, with the ε that leads from one to the
        next by the student's solver.
        """
        options = self.options
        coarse = student_schedule(options, self.noise, self.stages)
        fine, marks = refined(coarse, math.ceil(options.teacher_steps / options.student_steps), self.stages)
        for number, picture in _batches(content):
            generator = seeded(options.seed, Purpose.TEACHER, *seed, number)
            teacher = make_solver(options.solver, self.noise, fine)
            student = make_solver(options.solver, self.noise, coarse)
            latent = self._start(content, picture, coarse, generator)
            passed = []
            for step in fine.steps:
                state, guided = self._state(content, picture, latent, step.t)
                if step.index in marks:
                    passed.append(state)
                latent = _advance(teacher, guided, step.index, latent)
            ends = [state.latent for state in passed[1:]] + [latent]
            for index, (state, end) in enumerate(zip(passed, ends, strict=True)):
                target = landing_eps(student, index, state.latent.double().numpy(), end.double().numpy())
                yield States(
                    *(state.picture, state.timestep, state.stage, state.latent),
                    torch.from_numpy(target).float(),
                    state.unguided,
                )

    def states(self, content: Content, *seed: int, noised: int) -> Iterator[States]:
        """All states that the options ask for, of `content`; `seed` tells training from evaluation."""
        if self.options.student_steps:
            yield from self.landings(content, seed)
        else:
            yield from self.on_the_way(content, seed)
            if noised:
                yield from self.noised(content, noised, seed)

    def _start(
        self, content: Content, picture: torch.Tensor, schedule: TimestepSchedule, generator: torch.Generator
    ) -> torch.Tensor:
        latents = content.latents[picture]
        drawn = torch.randn(latents.shape, generator=generator)
        return torch.from_numpy(schedule.add_noise(latents.numpy(), drawn.numpy(), schedule.start_t))

    def _state(
        self, content: Content, picture: torch.Tensor, latent: torch.Tensor, t: int
    ) -> tuple[States, torch.Tensor]:
        timestep = torch.full((len(latent),), t)
        guided, plain = self(latent, timestep, content.hints[picture])
        stage = torch.full_like(timestep, stage_of(t, self.noise, self.stages))
        return States(picture, timestep, stage, latent, guided, plain), guided


def stage_of(t: int, noise: NoiseSchedule, stages: int) -> int:
    """The stage of a timestep, as `lsast_engines.diffusion.timesteps.Step` has it."""
    return t * stages // noise.train_steps


def student_schedule(options: DistilOptions, noise: NoiseSchedule, stages: int) -> TimestepSchedule:
    """The few steps of a student.

    Raises:
        UsageError: steps or a strength that give no schedule.
    """
    return TimestepSchedule.build(noise, options.student_steps, options.strength, stages, options.solver)


def shifted(schedule: TimestepSchedule, part: float, stages: int) -> TimestepSchedule:
    """`schedule` with every timestep lowered by `part` (0 to 1) of what lies below its last one, or of its stride."""
    steps = schedule.steps
    stride = steps[-2].t - steps[-1].t if len(steps) > 1 else steps[-1].t
    down = int(part * min(stride, steps[-1].t))
    return _schedule(schedule, [step.t - down for step in steps], stages, schedule.start_t - down)


def refined(schedule: TimestepSchedule, parts: int, stages: int) -> tuple[TimestepSchedule, list[int]]:
    """`schedule` with every step divided into at most `parts`, at whole timesteps, and where its own steps are then."""
    times = [step.t for step in schedule.steps]
    fine: list[int] = []
    marks = []
    for t, after in zip(times, [*times[1:], 0], strict=True):
        marks.append(len(fine))
        fine += sorted({t - (t - after) * part // parts for part in range(parts)} - {after}, reverse=True)
    return _schedule(schedule, fine, stages, schedule.start_t), marks


def landing_eps(
    solver: Solver, index: int, x: npt.NDArray[np.float64], end: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The ε with which `solver` goes from `x` at step `index` to `end`; it takes that step.

    A step is affine in ε, and its factor is the same in all places, so two trials on copies of the solver tell it.
    """
    zero = copy.deepcopy(solver).step(np.zeros_like(x), index, x)
    one = copy.deepcopy(solver).step(np.ones_like(x), index, x)
    eps: npt.NDArray[np.float64] = (end - zero) / (one - zero)
    solver.step(eps, index, x)
    return eps


def _schedule(like: TimestepSchedule, times: list[int], stages: int, start_t: int) -> TimestepSchedule:
    steps = [
        Step(index, t, t_prev, stage_of(t, like.noise, stages))
        for index, (t, t_prev) in enumerate(zip(times, [*times[1:], -1], strict=True))
    ]
    return TimestepSchedule(like.noise, like.solver, tuple(steps), start_t)


def _advance(solver: Solver, eps: torch.Tensor, index: int, latent: torch.Tensor) -> torch.Tensor:
    moved: Any = solver.step(eps.numpy(), index, latent.numpy())
    return torch.from_numpy(moved.astype(np.float32))


def _at_once(content: Content) -> int:
    return max(1, BATCH * 1024 // content.latents[0, 0].numel())


def _batches(content: Content) -> Iterator[tuple[int, torch.Tensor]]:
    yield from enumerate(torch.arange(len(content.latents)).split(_at_once(content)))
