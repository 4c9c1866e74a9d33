"""The networks that `sampler.sample` runs, and the graphs of a bundle as these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lsast_engines.backends.base import Engine, Feeds
from lsast_engines.bundle.graph_spec import CONTROLNET, UNET_FULL, UNET_OUTER
from lsast_engines.diffusion import NoiseSchedule
from lsast_engines.errors import BackendError

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Sigmas = npt.NDArray[np.float64]
"""sigma_t = sqrt(1 - abar_t), the share of noise in z_t."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a base. In the shapes, H and W are in pixels, h and w in latent cells."""

    vae_encoder: Callable[[Pixels], Floats]
    """Pictures [B, H, W, 3] → mean and standard deviation of their latents, [2, B, 4, h, w]."""
    controlnet_cond: Callable[[Pixels], Floats]
    """Edges [B, H, W] of 0 and 1 → what the ControlNet reads of them, [B, C, h, w]."""
    denoiser: Denoiser
    vae_decoder: Callable[[Floats], Pixels]
    """Latents [B, 4, h, w] → pictures [B, H, W, 3]."""
    latent_scale: np.float32
    """The denoiser's latents are the autoencoder's times this."""


class Denoiser(Protocol):
    """U-Net and ControlNet. One object serves one run of `sample`, whose steps it is called for in their order."""

    def __call__(self, feeds: Feeds) -> Floats:
        """Predict the noise: the inputs of the graph `denoiser` (`lsast_engines.bundle.graph_spec`), in which `hint` is
        what `Networks.controlnet_cond` gave → eps [G, B, 4, h, w]; G is 2 with guidance, null first, else 1."""

    def release_memory(self) -> None:
        """Give working memory back until the next call, see `Engine.release_memory`."""


class NotFiniteError(BackendError):
    """A graph gave a NaN or an infinity: fp16 overflows at 65504."""


@dataclass(frozen=True)
class CheckedEngine:
    """An engine whose outputs are checked."""

    engine: Engine
    before_run: Callable[[], None] = lambda: None
    """Called before each run; an exception that it raises ends the painting."""

    def __call__(self, feeds: Feeds) -> dict[str, Floats]:
        """Run on `feeds` and what is bound; the next run may overwrite the outputs. Raises `NotFiniteError`."""
        self.before_run()
        outputs = self.engine(feeds)
        for name, values in outputs.items():
            if not np.isfinite(values).all():
                dtype = self.engine.compute_dtype
                remedy = "" if dtype == "fp32" else "compute_dtype fp32, "
                raise NotFiniteError(
                    f"the graph {self.engine.spec.name} gave {np.count_nonzero(~np.isfinite(values))} values of {name} "
                    f"that are not finite, on {self.engine.backend} in {dtype}; try {remedy}a smaller guidance, or "
                    "another backend"
                )
        return outputs

    def one_by_one(self, name: str, batch: npt.NDArray[Any]) -> Iterator[dict[str, Floats]]:
        """Run on each [1, …] of a batch for the input `name`, so that memory does not grow with it, then give memory
        back. The next run may overwrite the outputs of one."""
        for item in batch:
            yield self({name: np.ascontiguousarray(item[None])})
        self.engine.release_memory()


@dataclass(frozen=True)
class GraphDenoiser:
    """The graph `denoiser`: U-Net and ControlNet in one. Inputs that stay the same object are bound once."""

    graph: CheckedEngine

    def __call__(self, feeds: Feeds) -> Floats:
        """See `Denoiser.__call__`."""
        kept, bound = {**feeds}, self.graph.engine.bound
        changing = {name: kept.pop(name) for name in ("latent", "timestep")}
        # Another painting may have bound its own since the last step.
        if unbound := {name: value for name, value in kept.items() if bound.get(name) is not value}:
            self.graph.engine.bind_inputs(unbound)
        return self.graph(changing)["eps"]

    def release_memory(self) -> None:
        """See `Denoiser.release_memory`."""
        self.graph.engine.release_memory()


def encode(graph: CheckedEngine, pictures: Pixels) -> Floats:
    """Run the graph `vae_encoder`, see `Networks.vae_encoder`."""
    images = pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    moments = [np.concatenate([outputs["mean"], outputs["std"]]) for outputs in graph.one_by_one("image", images)]
    return np.stack(moments, axis=1)


def embed_edges(graph: CheckedEngine, edges: Pixels) -> Floats:
    """Run the graph `controlnet_cond`, see `Networks.controlnet_cond`."""
    planes = np.repeat(edges[:, None], 3, axis=1).astype(np.float32)
    return np.concatenate([outputs["hint"].copy() for outputs in graph.one_by_one("edges", planes)])


def decode(graph: CheckedEngine, latents: Floats) -> Pixels:
    """Run the graph `vae_decoder` or `vae_decoder_tiny`, see `Networks.vae_decoder`."""
    return np.stack([to_pixels(rgb) for rgb in decode_rgb(graph, latents)])


def decode_rgb(graph: CheckedEngine, latents: Floats) -> Iterator[Floats]:
    """Decode each latent of [B, 4, h, w] to RGB values [H, W, 3] of about 0 … 255, before rounding."""
    for outputs in graph.one_by_one("latent", latents):
        yield (outputs["image"][0].transpose(1, 2, 0) + 1) * 127.5


def to_pixels(rgb: Floats) -> Pixels:
    """RGB values as bytes: clipped to 0 … 255 and rounded."""
    pixels: Pixels = np.round(np.clip(rgb, 0, 255)).astype(np.uint8)
    return pixels


class CachedDenoiser:
    """Step caching: the whole U-Net at every n-th step, and between them its outermost level alone; for one run.

    The steps between reuse the feature that the last full step computed below the outermost level (DeepCache, Ma et al.
    2023, arXiv 2312.00858). The ControlNet is skipped there as well: its effect is already in the cached feature, and
    its residuals at the outermost level are cached too. Cached values are extrapolated from the last two full steps
    (TaylorSeer, Liu et al. 2025, arXiv 2503.06923, order 1).
    """

    def __init__(self, graphs: Mapping[str, CheckedEngine], interval: int, noise: NoiseSchedule) -> None:
        """Of the graphs `UNET_SPLIT_GRAPHS`, ControlNet and U-Net run in full at every `interval`-th step, from the
        first; `noise` gives sigma of a timestep."""
        self._graphs = graphs
        self._interval = interval
        self._sigmas: Sigmas = np.sqrt(1 - noise.alphas_cumprod)
        self._step = 0
        self._cached: list[tuple[Sigmas, dict[str, Floats]]] = []
        """Of the last two full steps sigma [B], and copies of the residuals [B, …] and the feature [G, B, C, h, w]."""

    def __call__(self, feeds: Feeds) -> Floats:
        """See `Denoiser.__call__`."""
        full = self._step % self._interval == 0
        self._step += 1
        sigmas = self._sigmas[feeds["timestep"]]
        if not full:
            return self._run(UNET_OUTER, {**feeds, **self._extrapolated(sigmas)})["eps"]
        residuals = self._run(CONTROLNET, feeds)
        outputs = self._run(UNET_FULL, {**feeds, **residuals})
        copied = {name: value.copy() for name, value in {**residuals, "feature": outputs["feature"]}.items()}
        self._cached = [*self._cached[-1:], (sigmas, copied)]
        return outputs["eps"]

    def _extrapolated(self, sigmas: Sigmas) -> dict[str, Floats]:
        """The cached values at `sigmas` [B], linear in sigma; after a single full step they are reused as they are."""
        (before_at, before), (last_at, last) = self._cached[0], self._cached[-1]
        if len(self._cached) == 1:
            return last
        share = ((sigmas - last_at) / (last_at - before_at)).astype(np.float32)[:, None, None, None]
        return {name: value + share * (value - before[name]) for name, value in last.items()}

    def _run(self, name: str, feeds: Feeds) -> dict[str, Floats]:
        """Run a graph on those of `feeds` that it takes."""
        graph = self._graphs[name]
        return graph({tensor.name: feeds[tensor.name] for tensor in graph.engine.spec.inputs})

    def release_memory(self) -> None:
        """See `Denoiser.release_memory`; what is cached goes, too."""
        self._cached = []
        for graph in self._graphs.values():
            graph.engine.release_memory()
