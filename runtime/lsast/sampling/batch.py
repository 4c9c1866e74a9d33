"""Pictures that are painted together, as `sampler.sample` takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lsast_engines.bundle.style import LatentStatistics, StageKV, Style
from lsast_engines.diffusion import NoiseLevel, Solver, TimestepSchedule

from .networks import Floats, Pixels
from .x0_blend import X0Blend


class StyleSource(Protocol):
    """A style, or a mix of styles."""

    def stage(self, stage: int) -> StageKV:
        """Keys and values of one stage."""


@dataclass(frozen=True)
class Palette:
    """The artist's palette: the statistics of latents that sampling starts from and stays within, and how far."""

    mean: Floats
    """Mean of each latent channel, [4, 1, 1]."""
    std: Floats
    """Standard deviation of each, [4, 1, 1]."""
    amount: float
    """0 changes nothing; 1 gives these statistics exactly."""

    @classmethod
    def of(cls, parts: Sequence[tuple[float, LatentStatistics]], amount: float) -> Palette:
        """The mean of the statistics of several styles, each with its weight."""
        weights, statistics = zip(*parts, strict=True)
        mean, std = (
            np.average([getattr(entry, name) for entry in statistics], axis=0, weights=weights)
            .astype(np.float32)[:, None, None]
            for name in ("mean", "std")
        )  # fmt: skip
        return cls(mean, std, amount)

    def match(self, z0: Floats) -> Floats:
        """A picture's latent z0 [4, h, w] with the palette's mean and deviation by channel: adaptive instance
        normalisation (Huang & Belongie 2017, eq. 8), of the initial latent as in StyleID (Chung et al. 2024, section
        3.4)."""
        mean, std = z0.mean((1, 2), keepdims=True), z0.std((1, 2), keepdims=True)
        matched = self.mean + (z0 - mean) * (self.std / np.maximum(std, 1e-3))
        out: Floats = z0 + np.float32(self.amount) * (matched - z0)
        return out

    def limit(self, eps: Floats, x: Floats, level: NoiseLevel) -> Floats:
        """The predicted noise [4, h, w] at the latent `x`, with which no channel of the predicted x0 deviates more than
        the palette's: guidance widens the deviation beyond that of any work."""
        x0 = level.x0(x, eps)
        mean, std = x0.mean((1, 2), keepdims=True), x0.std((1, 2), keepdims=True)
        excess = (x0 - mean) * (1 - np.minimum(self.std / np.maximum(std, 1e-3), 1))
        limited: Floats = eps + np.float32(level.alpha / level.sigma * self.amount) * excess.astype(np.float32)
        return limited


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture of a batch, and how it is painted."""

    picture: Pixels
    """[H, W, 3]."""
    edges: Pixels
    """[H, W] of 0 and 1."""
    style: StyleSource
    schedule: TimestepSchedule
    """The steps; all pictures of a batch have equally many."""
    solver: Callable[[Floats], Solver]
    """Makes the solver of the run, given the picture's own latent z0 [4, h, w]."""
    guidance: float
    """Scale of classifier-free guidance. In a batch it is 1 in all pictures (one U-Net pass) or in none."""
    seed: int
    """Seed of all noise of this picture."""
    palette: Palette | None = None
    """The artist's palette; None keeps the picture's."""


class Batch:
    """Pictures that are painted together: of equal size, equally many steps, and with guidance or without."""

    def __init__(self, samples: Sequence[Sample], null: Style, control_scale: float) -> None:
        """Stack the pictures; `null` holds the base's unconditional keys and values, of one stage or of all."""
        self.pictures: Pixels = np.stack([sample.picture for sample in samples])
        self.edges: Pixels = np.stack([sample.edges for sample in samples])
        self.guidance: Floats = np.array([sample.guidance for sample in samples], np.float32)[:, None, None, None]
        self.control_scale: Floats = np.array(control_scale, np.float32)
        self.steps = len(samples[0].schedule.steps)
        self._samples = samples
        self._null = null
        self._rngs = [np.random.Generator(np.random.PCG64(sample.seed)) for sample in samples]
        self._stages: tuple[int, ...] | None = None
        self._style: StageKV

    def timesteps(self) -> Iterator[tuple[npt.NDArray[np.int64], tuple[int, ...]]]:
        """Timestep [B] and stage of each picture, step by step."""
        for steps in zip(*(sample.schedule.steps for sample in self._samples), strict=True):
            yield np.array([step.t for step in steps], np.int64), tuple(step.stage for step in steps)

    def noise(self, shape: tuple[int, ...]) -> Floats:
        """Standard normal noise [B, …], each picture's of its own seed."""
        return np.stack([rng.standard_normal(shape[1:], dtype=np.float32) for rng in self._rngs])

    def add_noise(self, z0: Floats, noise: Floats) -> Floats:
        """z_t at the timestep where each picture's run starts, [B, 4, h, w]: of z0 in the picture's palette."""
        rows = zip(self._samples, z0, noise, strict=True)
        return np.stack([
            sample.schedule.add_noise(sample.palette.match(z) if sample.palette else z, n) for sample, z, n in rows
        ])  # fmt: skip

    def style(self, stages: tuple[int, ...]) -> StageKV:
        """Keys and values of each picture's stage; the same object as long as the stages stay the same."""
        if stages != self._stages:
            rows = [sample.style.stage(stage) for sample, stage in zip(self._samples, stages, strict=True)]
            halves = [[row.kv_unet for row in rows]]
            if self.guidance[0] != 1:
                halves.insert(0, [self._null.stage(min(stage, self._null.stages - 1)).kv_unet for stage in stages])
            kv_unet = np.stack([np.stack(half) for half in halves])
            self._style = StageKV(kv_unet, np.stack([row.kv_control for row in rows]))
            self._stages = stages
        return self._style

    def solver(self, z0: Floats) -> BatchSolver:
        """The solvers of the run, given the pictures' own latents [B, 4, h, w]."""
        return BatchSolver([sample.solver(z) for sample, z in zip(self._samples, z0, strict=True)],
                           self._samples)  # fmt: skip


class BatchSolver:
    """The solver of each picture of a batch."""

    def __init__(self, solvers: Sequence[Solver], samples: Sequence[Sample]) -> None:
        self._solvers = solvers
        self._levels = [sample.schedule.levels() for sample in samples]
        self._palettes = [sample.palette for sample in samples]
        self.x0: Callable[[], Floats]
        """Computes the last x0 prediction, [B, 4, h, w]."""

    def step(self, eps: Floats, index: int, z: Floats) -> Floats:
        """See `Solver.step`; arrays are [B, 4, h, w]."""
        eps = eps.copy()  # `x0` may be computed after the next run has overwritten the graph's output
        for b, palette in enumerate(self._palettes):
            if palette is not None:
                eps[b] = palette.limit(eps[b], z[b], self._levels[b][index])
        after = np.stack([solver.step(eps[b], index, z[b]) for b, solver in enumerate(self._solvers)])
        blended = [solver.x0 if isinstance(solver, X0Blend) else None for solver in self._solvers]
        self.x0 = lambda: np.stack([
            self._levels[b][index].x0(z[b], eps[b]) if x0 is None else x0 for b, x0 in enumerate(blended)
        ])  # fmt: skip
        return after
