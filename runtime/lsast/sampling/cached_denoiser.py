"""Step caching: the whole U-Net at every n-th step, and between them its outermost level alone.

The steps between reuse the feature that the last full step computed below the outermost level (DeepCache, Ma et al.
2023, arXiv 2312.00858). The ControlNet is skipped there as well: its effect is already in the cached feature, and its
residuals at the outermost level are cached too. Cached values are extrapolated from the last two full steps
(TaylorSeer, Liu et al. 2025, arXiv 2503.06923, order 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lsast_engines.bundle.graph_spec import CONTROLNET, UNET_FULL, UNET_OUTER
from lsast_engines.bundle.style import StageKV
from lsast_engines.diffusion import NoiseSchedule

from .networks import Floats, Graph

Sigmas = npt.NDArray[np.float64]
"""sigma_t = sqrt(1 - abar_t), the share of noise in z_t."""


class Extrapolator:
    """Caches the outputs of a graph and extrapolates them linearly in sigma for the steps at which it is skipped. After
    a single run they are reused as they are."""

    def __init__(self) -> None:
        self._runs: list[tuple[Sigmas, dict[str, Floats]]] = []

    def update(self, sigmas: Sigmas, outputs: Mapping[str, Floats]) -> dict[str, Floats]:
        """Cache a copy of the outputs of a run at `sigmas` [B], each [B, …] or [G, B, C, h, w]; → the copy."""
        copied = {name: value.copy() for name, value in outputs.items()}
        self._runs = [*self._runs[-1:], (sigmas, copied)]
        return copied

    def at(self, sigmas: Sigmas) -> dict[str, Floats]:
        """The outputs of a run at `sigmas` [B], extrapolated."""
        (before_at, before), (last_at, last) = self._runs[0], self._runs[-1]
        if len(self._runs) == 1:
            return last
        share = ((sigmas - last_at) / (last_at - before_at)).astype(np.float32)[:, None, None, None]
        return {name: value + share * (value - before[name]) for name, value in last.items()}


class CachedDenoiser:
    """A denoiser of the split graphs, for one run; see `Denoiser`."""

    def __init__(self, graphs: Mapping[str, Graph], interval: int, noise: NoiseSchedule) -> None:
        """Of the graphs `UNET_SPLIT_GRAPHS`, ControlNet and U-Net run in full at every `interval`-th step, from the
        first; `noise` gives sigma of a timestep."""
        self._graphs = graphs
        self._interval = interval
        self._sigmas: Sigmas = np.sqrt(1 - noise.alphas_cumprod)
        self._step = 0
        self._residuals = Extrapolator()
        self._feature = Extrapolator()

    def __call__(
        self, latent: Floats, timestep: npt.NDArray[np.int64], hint: Floats, style: StageKV, control_scale: Floats
    ) -> Floats:
        """See `Denoiser.__call__`."""
        full = self._step % self._interval == 0
        self._step += 1
        sigmas = self._sigmas[timestep]
        inputs = {"latent": latent, "timestep": timestep, "hint": hint, "control_scale": control_scale,
                  **style._asdict()}  # fmt: skip
        if not full:
            return self._run(UNET_OUTER, {**inputs, **self._residuals.at(sigmas), **self._feature.at(sigmas)})["eps"]
        residuals = self._residuals.update(sigmas, self._run(CONTROLNET, inputs))
        outputs = self._run(UNET_FULL, {**inputs, **residuals})
        self._feature.update(sigmas, {"feature": outputs["feature"]})
        return outputs["eps"]

    def _run(self, name: str, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Floats]:
        """Run a graph on those of `inputs` that it takes."""
        graph = self._graphs[name]
        return graph({tensor.name: inputs[tensor.name] for tensor in graph.engine.spec.inputs})

    def release_memory(self) -> None:
        """See `Denoiser.release_memory`; what is cached goes, too."""
        self._residuals, self._feature = Extrapolator(), Extrapolator()
        for graph in self._graphs.values():
            graph.engine.release_memory()
