"""Pictures that are painted together, as `sampler.sample` takes them, with their styles, palettes and solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lsast_engines.bundle.manifest import AttentionLayer
from lsast_engines.bundle.style import LatentStatistics, StageKV, Style, StyleFile
from lsast_engines.diffusion import Array, NoiseLevel, TimestepSchedule, make_solver

from ..options.style_mix import Mix
from .networks import Floats, Pixels

_TENSORS = {"unet": "kv_unet", "control": "kv_control"}
"""The tensor of a `StageKV` for each network."""


class MixedStyle:
    """Keys and values of a mix, computed for each pair of a stage and a layer group: the weights of the terms that
    apply there are divided by their sum. Where none applies, the base's unconditional keys and values stand."""

    def __init__(
        self, mix: Mix, styles: Mapping[str, StyleFile | Style], null: Style, layers: Sequence[AttentionLayer]
    ) -> None:
        """Mix `styles`, all of one base, whose unconditional keys and values are `null`; `layers` are its
        `attention_layers`."""
        self._mix, self._styles, self._null, self._layers = mix, styles, null, layers

    def stage(self, stage: int) -> StageKV:
        """Keys and values of one stage, 0 … stages - 1, in new arrays; a `StyleError` where a file is damaged."""
        null = self._null.stage(min(stage, self._null.stages - 1))
        mixed = StageKV(np.array(null.kv_unet), np.array(null.kv_control))
        for layer in self._layers:
            tensor, columns = _TENSORS[layer.network], slice(layer.offset, layer.offset + 2 * layer.width)
            terms = [term for term in self._mix.terms if term.applies_to(stage, layer.group)]
            total = sum(term.weight for term in terms)
            rows = [getattr(self._styles[term.style].stage(stage), tensor)[:, columns] for term in terms]
            if terms:
                getattr(mixed, tensor)[:, columns] = sum(
                    term.weight / total * row.astype(np.float64) for term, row in zip(terms, rows, strict=True)
                )
        return mixed


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
        """The predicted noise [4, h, w] at the latent `x`, changed so that no channel of the predicted x0 has a larger
        standard deviation than the palette's: guidance makes it larger than in any work of the artist."""
        x0 = level.x0(x, eps)
        mean, std = x0.mean((1, 2), keepdims=True), x0.std((1, 2), keepdims=True)
        excess = (x0 - mean) * (1 - np.minimum(self.std / np.maximum(std, 1e-3), 1))
        limited: Floats = eps + np.float32(level.alpha / level.sigma * self.amount) * excess.astype(np.float32)
        return limited


@dataclass(frozen=True)
class X0Blend:
    """Replaces the predicted x0 by x0 + w · (target - x0); ε is adjusted to match. Where w is 1 every solver stays on
    the target noised, sqrt(abar) target + sqrt(1 - abar) noise, as RePaint does (Lugmayr et al. 2022, eq. 8). See
    `lsast_engines.diffusion` for the letters."""

    target: Array
    """[4, h, w]."""
    weight: Array
    """w, 0 … 1: [h, w]."""

    def apply(self, eps: Array, x: Array, level: NoiseLevel) -> tuple[Array, Array]:
        """The predicted noise at the latent `x`, adjusted, and the blended x0: [4, h, w] each."""
        x0 = level.x0(x, eps)
        adjusted = eps - level.alpha / level.sigma * self.weight * (self.target - x0)
        return adjusted, x0 + self.weight * (self.target - x0)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture of a batch, and how it is painted."""

    picture: Pixels
    """[H, W, 3]."""
    edges: Pixels
    """[H, W] of 0 and 1."""
    style: StyleFile | Style | MixedStyle
    schedule: TimestepSchedule
    """The steps; all pictures of a batch have equally many."""
    blends: Callable[[Floats], Sequence[X0Blend]]
    """What blends every step's x0, one after the other, given the picture's own latent z0 [4, h, w]."""
    guidance: float
    """Scale of classifier-free guidance. In a batch it is 1 in all pictures (one U-Net pass) or in none."""
    seed: int
    palette: Palette | None = None


class Batch:
    """Pictures that are painted together: of equal size, equally many steps, and with guidance or without."""

    def __init__(self, samples: Sequence[Sample], null: Style, control_scale: float) -> None:
        """Stack the pictures; `null` holds the base's unconditional keys and values, of one stage or of all."""
        self.pictures: Pixels = np.stack([sample.picture for sample in samples])
        self.edges: Pixels = np.stack([sample.edges for sample in samples])
        self.guidance: Floats = np.array([sample.guidance for sample in samples], np.float32)[:, None, None, None]
        self.control_scale: Floats = np.array(control_scale, np.float32)
        self.steps = len(samples[0].schedule.steps)
        self.samples = samples
        self._null = null
        self._rngs = [np.random.Generator(np.random.PCG64(sample.seed)) for sample in samples]
        self._stages: tuple[int, ...] | None = None
        self._style: StageKV

    def timesteps(self) -> Iterator[tuple[npt.NDArray[np.int64], tuple[int, ...]]]:
        """Timestep [B] and stage of each picture, step by step."""
        for steps in zip(*(sample.schedule.steps for sample in self.samples), strict=True):
            yield np.array([step.t for step in steps], np.int64), tuple(step.stage for step in steps)

    def noise(self, shape: tuple[int, ...]) -> Floats:
        """Standard normal noise [B, …], each picture's of its own seed."""
        return np.stack([rng.standard_normal(shape[1:], dtype=np.float32) for rng in self._rngs])

    def add_noise(self, z0: Floats, noise: Floats) -> Floats:
        """z_t at the timestep where each picture's run starts, [B, 4, h, w]: of z0 in the picture's palette."""
        rows = zip(self.samples, z0, noise, strict=True)
        return np.stack([
            sample.schedule.add_noise(sample.palette.match(z) if sample.palette else z, n) for sample, z, n in rows
        ])  # fmt: skip

    def style(self, stages: tuple[int, ...]) -> StageKV:
        """Keys and values of each picture's stage; the same object as long as the stages stay the same."""
        if stages != self._stages:
            rows = [sample.style.stage(stage) for sample, stage in zip(self.samples, stages, strict=True)]
            halves = [[row.kv_unet for row in rows]]
            if self.guidance[0] != 1:
                halves.insert(0, [self._null.stage(min(stage, self._null.stages - 1)).kv_unet for stage in stages])
            kv_unet = np.stack([np.stack(half) for half in halves])
            self._style = StageKV(kv_unet, np.stack([row.kv_control for row in rows]))
            self._stages = stages
        return self._style


class BatchSolver:
    """The solver of each picture of a batch."""

    def __init__(self, samples: Sequence[Sample], z0: Floats) -> None:
        """For the steps of a run from the pictures' own latents z0 [B, 4, h, w]."""
        self._samples = samples
        self._solvers = [make_solver(sample.schedule) for sample in samples]
        self._levels = [sample.schedule.levels() for sample in samples]
        self._blends = [sample.blends(z) for sample, z in zip(samples, z0, strict=True)]
        self.x0: Floats
        """The last x0 prediction, [B, 4, h, w]."""

    def step(self, eps: Floats, index: int, z: Floats) -> Floats:
        """See `Solver.step`; arrays are [B, 4, h, w]."""
        after, predicted = [], []
        for b, sample in enumerate(self._samples):
            noise: Array = eps[b]
            level = self._levels[b][index]
            if sample.palette is not None:
                noise = sample.palette.limit(eps[b], z[b], level)
            x0 = level.x0(z[b], noise)
            for blend in self._blends[b]:
                noise, x0 = blend.apply(noise, z[b], level)
            after.append(self._solvers[b].step(noise, index, z[b]))
            predicted.append(x0)
        self.x0 = np.stack(predicted)
        return np.stack(after)
