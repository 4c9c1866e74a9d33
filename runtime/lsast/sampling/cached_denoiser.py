"""The denoiser in parts, each run where the plan of `passes` says so, with what is kept between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lsast_engines.backends.base import ComputeDtype, Engine, Feeds
from lsast_engines.bundle.graph_spec import CONTROLNET, UNET_FULL, UNET_OUTER, GraphSpec
from lsast_engines.diffusion.noise_schedule import NoiseSchedule

from .step_plan import Pass
from .tiling import Grid, Span

Floats = npt.NDArray[np.float32]
Sigmas = npt.NDArray[np.float64]
"""sigma_t = sqrt(1 - abar_t), the noise's share in z_t."""


class _Forecast:
    """Caches a graph's outputs and extrapolates them linearly in sigma for the steps at which it is skipped.

    That is TaylorSeer's first order (Liu et al. 2025, arXiv 2503.06923), along sigma instead of the step's number.
    After one run the outputs are reused as they are, which is DeepCache.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[Sigmas, dict[str, Floats]]] = []

    def keep(self, sigmas: Sigmas, outputs: Mapping[str, Floats]) -> dict[str, Floats]:
        """Keep a copy of what a run at `sigmas` [B] gave, each [B, …] or [G, B, C, h, w]; → the copy."""
        copied = {name: value.copy() for name, value in outputs.items()}
        self._runs = [*self._runs[-1:], (sigmas, copied)]
        return copied

    def at(self, sigmas: Sigmas) -> dict[str, Floats]:
        """What a run at `sigmas` [B] would give."""
        assert self._runs, "at the first step everything runs"
        (before_at, before), (last_at, last) = self._runs[0], self._runs[-1]
        if len(self._runs) == 1:
            return last
        share = ((sigmas - last_at) / (last_at - before_at)).astype(np.float32)[:, None, None, None]
        return {name: value + share * (value - before[name]) for name, value in last.items()}


@dataclass
class _Kept:
    """What one tile keeps between steps."""

    control: _Forecast = field(default_factory=_Forecast)
    """Of the ControlNet's residuals."""
    deep: _Forecast = field(default_factory=_Forecast)
    """Of the deep feature."""


class PartedDenoiser:
    """Stands for the `denoiser` graph in `sampler.denoise`, on a canvas of any size; see `Engine`.

    It is called once a step, in order, and binding the `hint` begins a run. Every tile keeps its own.
    """

    def __init__(
        self, engines: Mapping[str, Engine], spec: GraphSpec, passes: Sequence[Pass], grid: Grid, noise: NoiseSchedule
    ) -> None:
        """A denoiser.

        Args:
            engines: the graphs that the plan needs, by name (`passes.graphs_of`).
            spec: of the graph `denoiser`.
            passes: what runs at which step.
            grid: the tiles of the canvas.
            noise: what a timestep's sigma is found by.
        """
        self.spec = spec
        first = next(iter(engines.values()))
        self.backend, self.device = first.backend, first.device
        self.compute_dtype: ComputeDtype = first.compute_dtype
        self._engines = engines
        self._passes = passes
        self._grid = grid
        self._sigmas: Sigmas = np.sqrt(1 - noise.alphas_cumprod())
        self._bound: dict[str, npt.NDArray[np.float32]] = {}
        self._begin()

    def _begin(self) -> None:
        self._step = 0
        self._kept = [_Kept() for _ in self._grid]

    def bind_inputs(self, feeds: Feeds) -> None:
        """See `Engine.bind_inputs`."""
        if "hint" in feeds:
            self._begin()
        self._bound |= feeds

    def __call__(self, feeds: Feeds) -> dict[str, Floats]:
        """See `Engine.__call__`; `latent` [B, 4, h, w] and `eps` [G, B, 4, h, w] are of the whole canvas."""
        now = self._passes[self._step]
        self._step += 1
        eps: Floats | None = None
        for tile, kept in zip(self._grid, self._kept, strict=True):
            found = self._predict(feeds, now, tile, kept)
            if self._grid.whole:
                return {"eps": found}
            if eps is None:
                eps = np.zeros((*found.shape[:-2], *self._grid.cells), np.float32)
            row, column = tile
            eps[..., row.cells, column.cells] += found * row.weight[:, None] * column.weight
        assert eps is not None
        return {"eps": eps}

    def _predict(self, feeds: Feeds, now: Pass, tile: tuple[Span, Span], kept: _Kept) -> Floats:
        """One tile's noise."""
        at = (..., tile[0].cells, tile[1].cells)
        given = {**self._bound, **feeds, "latent": feeds["latent"][at], "hint": self._bound["hint"][at]}
        sigmas = self._sigmas[given["timestep"]]
        if now == "deep":
            residuals = kept.control.keep(sigmas, self._run(CONTROLNET, given))
            outputs = self._run(UNET_FULL, {**given, **residuals})
            kept.deep.keep(sigmas, {"feature": outputs["feature"]})
            return outputs["eps"]
        return self._run(UNET_OUTER, {**given, **kept.control.at(sigmas), **kept.deep.at(sigmas)})["eps"]

    def _run(self, name: str, given: Feeds) -> dict[str, Floats]:
        """Run a part on those of `given` that it takes."""
        engine = self._engines[name]
        return engine({tensor.name: given[tensor.name] for tensor in engine.spec.inputs})

    def release_memory(self) -> None:
        """See `Engine.release_memory`."""
        self._begin()
        for engine in self._engines.values():
            engine.release_memory()

    def close(self) -> None:
        """Does nothing: the engines belong to who opened them."""
