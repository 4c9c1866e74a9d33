"""The artist's palette: sampling starts from, and stays within, the statistics of the artist's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lsast_engines.bundle.style import LatentStatistics
from lsast_engines.diffusion.noise_schedule import NoiseLevel

from .networks import Floats


@dataclass(frozen=True)
class Palette:
    """The statistics that a latent is led towards, and how far."""

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
