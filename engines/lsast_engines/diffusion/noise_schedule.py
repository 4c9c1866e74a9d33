"""The noise schedule of a base, shared by training and sampling."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, fault_list

Array = npt.NDArray[np.floating[Any]]
Floats = TypeVar("Floats", npt.NDArray[np.float32], npt.NDArray[np.float64])

BetaSchedule = Literal["scaled_linear", "linear"]
"""How beta grows with the timestep: linearly in its square root (Stable Diffusion), or linearly."""


MAX_TRAIN_STEPS = 100_000
"""Largest number of timesteps."""

_MIN_ALPHA = 1e-12
"""Below, the solvers' logarithms of the signal-to-noise ratio lose all digits."""


@dataclass(frozen=True)
class NoiseLevel:
    """A noise level: x = alpha x_0 + sigma ε, with alpha = sqrt(abar) and sigma = sqrt(1 - abar)."""

    alpha: float
    sigma: float

    @classmethod
    def of(cls, abar: float) -> NoiseLevel:
        """The level of an abar in (0, 1]; 1 is no noise."""
        return cls(abar**0.5, (1 - abar) ** 0.5)

    @property
    def lam(self) -> float:
        """λ = log(alpha / sigma); infinite without noise."""
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf

    def add_noise(self, x0: Floats, noise: Floats) -> Floats:
        """x, of any shape and in the type of `x0`."""
        x: Floats = self.alpha * x0 + self.sigma * noise
        return x

    def x0(self, x: Array, eps: Array) -> Array:
        """The data prediction, (x - sigma ε) / alpha."""
        return (x - self.sigma * eps) / self.alpha


@dataclass(frozen=True)
class NoiseSchedule:
    """Variances beta_t of the forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t) (Ho et al. 2020).

    Raises:
        UsageError: invalid values; all of them at once.
    """

    train_steps: int = 1000
    """Timesteps of the forward process, t = 0 … train_steps - 1."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"

    def __post_init__(self) -> None:
        faults = []
        if not 1 <= self.train_steps <= MAX_TRAIN_STEPS:
            faults.append(f"train_steps: found {self.train_steps}; expected 1 to {MAX_TRAIN_STEPS}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            faults.append(f"betas: found {self.beta_start} to {self.beta_end}; expected 0 < beta_start <= beta_end < 1")
        if self.beta_schedule not in get_args(BetaSchedule):
            expected = ", ".join(get_args(BetaSchedule))
            faults.append(f"beta_schedule: found {self.beta_schedule!r}; expected one of {expected}")
        if not faults and not self.alphas_cumprod[-1] > _MIN_ALPHA:
            faults.append(
                f"betas: {self.beta_start} to {self.beta_end} leave {self.alphas_cumprod[-1]:g} of the picture after "
                f"{self.train_steps} timesteps; expected more than {_MIN_ALPHA:g}"
            )
        if faults:
            raise UsageError(fault_list("invalid noise schedule:", faults))

    @functools.cached_property
    def alphas_cumprod(self) -> npt.NDArray[np.float64]:
        """abar_t = prod_{s<=t} (1 - beta_s), float64 [train_steps]: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.train_steps, dtype=np.float64)
        else:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps, dtype=np.float64) ** 2
        abars: npt.NDArray[np.float64] = np.cumprod(1.0 - betas, dtype=np.float64)
        abars.setflags(write=False)  # it is shared by all callers
        return abars

    def level(self, t: int) -> NoiseLevel:
        """The noise level of timestep t, 0 … train_steps - 1."""
        return NoiseLevel.of(float(self.alphas_cumprod[t]))
