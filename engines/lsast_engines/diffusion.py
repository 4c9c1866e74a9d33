"""The mathematics of sampling: noise schedule, timesteps, guidance and solvers, in NumPy, as their papers write it.

A step goes from timestep s to the less noisy t. With abar of the schedule::

    α = sqrt(abar)    σ = sqrt(1 - abar)    λ = log(α / σ)    h = λ_t - λ_s > 0
    x_s = α_s x_0 + σ_s ε                   the marginal; the denoiser predicts ε
    x0  = (x_s - σ_s ε) / α_s               the data prediction, x_θ in the papers

All operations are elementwise, so the samples of a batch are independent; arrays keep their type, float32 or float64.
"""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from .errors import UsageError, fault_list

Array = npt.NDArray[np.floating[Any]]
Floats = TypeVar("Floats", npt.NDArray[np.float32], npt.NDArray[np.float64])

BetaSchedule = Literal["scaled_linear", "linear"]
"""How beta grows with the timestep: linearly in its square root (Stable Diffusion), or linearly."""

MAX_TRAIN_STEPS = 100_000
"""Largest number of timesteps."""

_MIN_ALPHA = 1e-12  # below, the solvers' logarithms of the signal-to-noise ratio lose all digits


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
    A `UsageError` lists all invalid values."""

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


def guide(eps: Any, guidance: Any) -> Any:
    """The guided noise: eps_null + guidance * (eps_style - eps_null), docs/method.md §4, step 5.

    Classifier-free guidance (arXiv 2207.12598), for NumPy arrays and torch tensors alike.

    Args:
        eps: predicted noise [G, ...], an array or a tuple of G arrays: (eps_null, eps_style), or (eps_style,) alone,
            which is returned unchanged.
        guidance: scale, or the scales [B, 1, 1, 1] of a batch; 1 gives eps_style, larger values lead away from
            eps_null.
    """
    if len(eps) == 1:
        return eps[0]
    null, style = eps
    return null + guidance * (style - null)


class Solver(abc.ABC):
    """A solver for the noise levels of one schedule (`TimestepSchedule.levels`).

    It may keep predictions of earlier steps, so use it for one run at a time.
    """

    def __init__(self, levels: list[NoiseLevel]) -> None:
        self._levels = levels

    @abc.abstractmethod
    def step(self, eps: Array, index: int, x: Array) -> Array:
        """Take one step.

        Args:
            eps: predicted noise at step `index`, of the shape of `x`.
            index: position in `schedule.steps`; steps are taken in order, and 0 starts a new run.
            x: the latent at step `index`, e.g. [B, 4, h, w]; a new array is returned, at step `index` + 1, or the clean
                latent after the last.
        """


class Ddim(Solver):
    """DDIM (Song, Meng, Ermon 2021), eq. 12 with η = 0; its α is abar here."""

    def step(self, eps: Array, index: int, x: Array) -> Array:
        """See `Solver.step`."""
        s, t = self._levels[index], self._levels[index + 1]
        return t.alpha * s.x0(x, eps) + t.sigma * eps


class DpmSolverPp2M(Solver):
    """DPM-Solver++(2M) (Lu et al. 2022b), Algorithm 2, data prediction.

    First order at the first step, and at the last, where h is infinite.
    """

    _x0_before: Array

    def step(self, eps: Array, index: int, x: Array) -> Array:
        """See `Solver.step`."""
        s, t = self._levels[index], self._levels[index + 1]
        x0 = s.x0(x, eps)
        h = t.lam - s.lam
        d = x0  # D_i
        if index > 0 and math.isfinite(h):
            r = (s.lam - self._levels[index - 1].lam) / h  # r_i = h_{i-1} / h_i
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * self._x0_before
        self._x0_before = x0
        return t.sigma / s.sigma * x - t.alpha * math.expm1(-h) * d


class UniPc(Solver):
    """UniPC-2, B_2(h) = e^h - 1 (Zhao et al. 2023), Algorithm 2 (UniP) and 1 (UniC), data prediction.

    Every step first corrects the latent of the predictor with the evaluation at that latent, so the corrector needs no
    evaluation of its own, and then predicts the next latent.

    With data prediction h enters as -h. With s_0 the start of the step, s_1 that of the step before, r_1 = (λ_{s1} -
    λ_{s0}) / h, D_1 = (x0_{s1} - x0_{s0}) / r_1 and D_t = x0_t - x0_{s0}, both are::

        x_t = σ_t / σ_{s0} x - α_t (e^{-h} - 1) x0_{s0} - α_t B(h) (ρ_1 D_1 + ρ_t D_t),    B(h) = e^{-h} - 1

    The predictor has no D_t and ρ_1 = 1/2.
    """

    _x0s: list[Array]  # the last two data predictions, newest last
    _x_before: Array
    _order: int  # of the step before

    def step(self, eps: Array, index: int, x: Array) -> Array:
        """See `Solver.step`."""
        x0 = self._levels[index].x0(x, eps)
        if index == 0:
            self._x0s = []
        else:
            x = self._correct(index - 1, x0)
        self._x0s = [*self._x0s[-1:], x0]
        self._order = 2 if index > 0 and math.isfinite(self._h(index)) else 1
        self._x_before = x
        return self._update(index, x, 0 if self._order == 1 else 0.5 * self._d1(index))

    def _correct(self, index: int, x0_t: Array) -> Array:
        """UniC: step `index` again, with the data prediction `x0_t` at its end."""
        d_t = x0_t - self._x0s[-1]
        if self._order == 1:
            return self._update(index, self._x_before, 0.5 * d_t)
        # ρ solves R_2(h) ρ = φ_2(h) / B(h), that is ρ_1 + ρ_t = b_1 and r_1 ρ_1 + ρ_t = b_2.
        h = -self._h(index)
        r1 = self._r1(index)
        phi_2 = math.expm1(h) / h - 1  # h φ_2(h)
        phi_3 = phi_2 / h - 1 / 2  # h φ_3(h)
        b1, b2 = phi_2 / math.expm1(h), 2 * phi_3 / math.expm1(h)
        rho_1 = (b1 - b2) / (1 - r1)
        rho_t = b1 - rho_1
        return self._update(index, self._x_before, rho_1 * self._d1(index) + rho_t * d_t)

    def _update(self, index: int, x: Array, correction: Array | float) -> Array:
        """The common formula; `correction` is ρ_1 D_1 + ρ_t D_t."""
        s, t = self._levels[index], self._levels[index + 1]
        return t.sigma / s.sigma * x - t.alpha * math.expm1(-self._h(index)) * (self._x0s[-1] + correction)

    def _h(self, index: int) -> float:
        return self._levels[index + 1].lam - self._levels[index].lam

    def _r1(self, index: int) -> float:
        return (self._levels[index - 1].lam - self._levels[index].lam) / self._h(index)

    def _d1(self, index: int) -> Array:
        d: Array = (self._x0s[-2] - self._x0s[-1]) / self._r1(index)
        return d


class SolverEntry(NamedTuple):
    """A solver and the timesteps that it takes (`TimestepSchedule`)."""

    make: type[Solver]
    """Given the noise level of every step and that of the end of the run, it makes the solver."""
    to_zero: bool
    """Whether the last step ends at sigma 0, not at that of t = 0 (`final_sigmas_type` in diffusers)."""
    released: bool = False
    """Whether the grid is that of LSAST's released code."""


SOLVERS = {
    "ddim": SolverEntry(Ddim, to_zero=False),
    "dpmpp2m": SolverEntry(DpmSolverPp2M, to_zero=True),
    "unipc": SolverEntry(UniPc, to_zero=True),
    "ddim_lsast": SolverEntry(Ddim, to_zero=False, released=True),
}
"""The solvers by name."""


def make_solver(schedule: TimestepSchedule) -> Solver:
    """The solver that `schedule` names, ready for its first step."""
    return SOLVERS[schedule.solver].make(schedule.levels())


@dataclass(frozen=True)
class Step:
    """One evaluation of the denoiser, and the step of the solver after it."""

    index: int
    """Position in the run, from 0."""
    t: int
    """Timestep of the evaluation."""
    stage: int
    """Stage of the prompts: t * stages // train_steps; stage 0 is next to the clean picture (docs/method.md §1.4)."""


@dataclass(frozen=True)
class TimestepSchedule:
    """The steps of one run, from the noisiest, as in diffusers' image-to-image pipelines.

    The grid is "leading" (Lin et al. 2023, table 2) with offset 1. For DDIM it has `steps` points from t = 1 up. For
    the multistep solvers it has the `steps` points above t = 1 of a grid of steps + 1, because their last step ends at
    the clean latent.

    The solver `ddim_lsast` is DDIM on the grid of LSAST's released code (docs/method.md §4, 3 and 4): T = 1, 1 + c,
    1 + 2c … up to train_steps, with c = train_steps // steps; these may be more than `steps` points. With
    n = int(steps * strength) the latent is noised to T[n], but the first step is at T[n-1].
    """

    noise: NoiseSchedule
    solver: str
    """The solver that the grid is for."""
    steps: tuple[Step, ...]
    """The last int(steps * strength) points of the grid, at least one."""
    start_t: int
    """The timestep to which the latent is noised: that of the first step, with `ddim_lsast` one grid point more."""

    @classmethod
    def build(
        cls, noise: NoiseSchedule, steps: int, strength: float, stages: int, solver: str = "ddim"
    ) -> TimestepSchedule:
        """The schedule of a run for a base's noise schedule, and prompts of as many `stages`.

        Args:
            steps: points of the full grid of `solver`, from pure noise down.
            strength: part of the grid that is run, in (0, 1].

        Raises:
            UsageError: values out of range, all at once. With `ddim_lsast` also values with which the released code
                fails or does not denoise.
        """
        faults: list[str] = []
        entry = SOLVERS.get(solver, SOLVERS["ddim"])
        if solver not in SOLVERS:
            faults.append(f"solver: found {solver!r}; expected one of {', '.join(SOLVERS)}")
        if not 0 < strength <= 1:
            faults.append(f"strength: found {strength}; expected more than 0 and at most 1")
        if stages < 1:
            faults.append(f"stages: found {stages}; expected at least 1")
        largest = noise.train_steps - (0 if entry.released else 1 + entry.to_zero)
        if not 1 <= steps <= largest:
            faults.append(f"steps: found {steps}; expected 1 to {largest} with {solver}")
        elif entry.released:
            faults += _released_faults(noise.train_steps, steps, strength)
        if faults:
            raise UsageError(fault_list("invalid schedule:", faults))
        grid = _grid(noise.train_steps, steps, entry)
        run = grid[len(grid) - max(int(steps * strength), 1) :]
        start_t = grid[len(grid) - len(run) - entry.released]
        steps_run = tuple(Step(index, t, t * stages // noise.train_steps) for index, t in enumerate(run))
        return cls(noise, solver, steps_run, start_t)

    def levels(self) -> list[NoiseLevel]:
        """The noise level of every step, then that of the end of the run: [len(steps) + 1]."""
        end = NoiseLevel.of(1) if SOLVERS[self.solver].to_zero else self.noise.level(0)
        return [*(self.noise.level(step.t) for step in self.steps), end]

    def add_noise(self, z0: Floats, noise: Floats) -> Floats:
        """The latent where the run starts, z_t at t = `start_t`; any shape, in the type of `z0`."""
        return self.noise.level(self.start_t).add_noise(z0, noise)


def _grid(train_steps: int, steps: int, solver: SolverEntry) -> list[int]:
    """All timesteps of a grid from the noisiest down."""
    points = steps + solver.to_zero
    stride = train_steps // points
    count = math.ceil(train_steps / stride) if solver.released else points
    # The first timestep of every grid is 1, ``steps_offset`` in diffusers.
    return [1 + stride * k for k in reversed(range(count))][: count - solver.to_zero]


def _released_faults(train_steps: int, steps: int, strength: float) -> list[str]:
    grid = _grid(train_steps, steps, SOLVERS["ddim_lsast"])
    faults = []
    if grid[0] >= train_steps:
        faults.append(
            f"steps: found {steps}; expected another number with ddim_lsast, such as 50: that code's grid would go by "
            f"{train_steps // steps} up to t = {grid[0]}, past its last timestep {train_steps - 1}, and fail"
        )
    run = int(steps * strength) if 0 < strength <= 1 else 1
    if run < 1:
        faults.append(
            f"strength: found {strength} at {steps} steps; expected at least {1 / steps:.3g} with ddim_lsast: "
            "that code would take no step and give back the noised latent"
        )
    if run >= len(grid):
        faults.append(
            f"strength: found {strength} at {steps} steps; expected less with ddim_lsast: that code would noise to "
            f"point {run} of a grid whose last is {len(grid) - 1}, and fail"
        )
    return faults
