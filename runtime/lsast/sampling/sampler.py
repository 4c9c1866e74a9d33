"""The sampling algorithm of LSAST, and the networks that it runs.

`sample` is the algorithm, from pictures to paintings, for a batch. Every other module of this package wraps one of its
nouns: `tiling` the networks, `cached_denoiser` the denoiser, `mixed_style` the style, `x0_blend` the solver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lsast_engines.backends.base import Engine, Feeds
from lsast_engines.bundle.style import StageKV, Style
from lsast_engines.diffusion.guidance import guide
from lsast_engines.diffusion.solvers import Solver
from lsast_engines.diffusion.timesteps import TimestepSchedule
from lsast_engines.errors import BackendError

from .x0_blend import X0Blend

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

StepCallback = Callable[[int, int, Callable[[], Floats]], None]
"""Called before the first step and after each with the number of steps done, the number there are, and a function that
gives the predicted clean latent x0 [B, 4, h, w]. An exception that it raises ends the run."""


def sample(networks: Networks, batch: Batch, callback: StepCallback | None = None) -> tuple[Floats, Pixels]:
    """Repaint a batch of pictures: LSAST's inference (docs/method.md §4), in which E is the encoder, D the decoder::

        z0 = E(picture);  z_t = add_noise(z0);  for each t: eps = CFG(U-Net + ControlNet | prompt of stage s(t)),
        z_(t-1) = solver(z_t, eps);  painting = D(z0)

    Args:
        networks: the networks of the base, plain or wrapped.
        batch: what to paint, and how.
        callback: called before the first step and after each.

    Returns:
        The painted latents [B, 4, h, w], and the paintings [B, H, W, 3].
    """
    mean, std = networks.vae_encoder(batch.pictures)  # [B, 4, h, w] each
    z0 = networks.latent_scale * (mean + std * batch.noise(mean.shape))
    hint = networks.controlnet_cond(batch.edges)  # [B, C, h, w]; once, because it does not depend on t
    z = batch.add_noise(z0, batch.noise(z0.shape))
    solver = batch.solver(z0)
    if callback:
        callback(0, batch.steps, lambda: z0)
    for step, (t, stages) in enumerate(batch):
        kv = batch.style(stages)  # keys and values of the prompt of stage s(t) = floor(t * stages / 1000)
        eps = guide(networks.denoiser(z, t, hint, kv, batch.control_scale), batch.guidance)
        z = solver.step(eps, step, z)
        if callback:
            callback(step + 1, batch.steps, solver.x0)
    networks.denoiser.release_memory()
    return z, networks.vae_decoder(z / networks.latent_scale)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a base. In the shapes, H and W are in pixels, h and w in latent cells."""

    vae_encoder: Callable[[Pixels], tuple[Floats, Floats]]
    """Pictures [B, H, W, 3] → mean and standard deviation of their latents, [B, 4, h, w] each."""
    controlnet_cond: Callable[[Pixels], Floats]
    """Edges [B, H, W] of 0 and 1 → what the ControlNet reads of them, [B, C, h, w]."""
    denoiser: Denoiser
    vae_decoder: Callable[[Floats], Pixels]
    """Latents [B, 4, h, w] → pictures [B, H, W, 3]."""
    latent_scale: np.float32
    """The denoiser's latents are the autoencoder's times this."""


class Denoiser(Protocol):
    """U-Net and ControlNet. One object serves one run of `sample`, whose steps it is called for in their order."""

    def __call__(
        self, latent: Floats, timestep: npt.NDArray[np.int64], hint: Floats, style: StageKV, control_scale: Floats
    ) -> Floats:
        """Predict the noise.

        Args:
            latent: z_t [B, 4, h, w].
            timestep: t [B].
            hint: what `Networks.controlnet_cond` gave.
            style: kv_unet [G, B, T, Wu] and kv_control [B, T, Wc]; G is 2 with guidance (null first), else 1.
            control_scale: factor of the ControlNet's residuals, a scalar array.

        Returns:
            eps [G, B, 4, h, w].
        """

    def release_memory(self) -> None:
        """Give working memory back until the next call, see `Engine.release_memory`."""


class StyleSource(Protocol):
    """A style, or a mix of styles."""

    def stage(self, stage: int) -> StageKV:
        """Keys and values of one stage."""


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
    """Scale of classifier-free guidance; 1 in all pictures of a batch or in none, for at 1 eps_null is not computed."""
    seed: int
    """Seed of all noise of this picture."""


class Batch:
    """Pictures that are painted together: of equal size, equally many steps, and with guidance or without."""

    def __init__(self, samples: Sequence[Sample], null: Style, control_scale: float) -> None:
        """Stack the pictures.

        Args:
            samples: the pictures.
            null: the base's unconditional keys and values, of one stage or of all.
            control_scale: factor of the ControlNet's residuals.
        """
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

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.int64], tuple[int, ...]]]:
        """Timestep [B] and stage of each picture, step by step."""
        for steps in zip(*(sample.schedule.steps for sample in self._samples), strict=True):
            yield np.array([step.t for step in steps], np.int64), tuple(step.stage for step in steps)

    def noise(self, shape: tuple[int, ...]) -> Floats:
        """Standard normal noise [B, …], each picture's of its own seed."""
        return np.stack([rng.standard_normal(shape[1:], dtype=np.float32) for rng in self._rngs])

    def add_noise(self, z0: Floats, noise: Floats) -> Floats:
        """z_t at the timestep where each picture's run starts, [B, 4, h, w]."""
        rows = zip(self._samples, z0, noise, strict=True)
        return np.stack([sample.schedule.add_noise(z, n) for sample, z, n in rows])

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
                           [sample.schedule for sample in self._samples])  # fmt: skip


class BatchSolver:
    """The solver of each picture of a batch."""

    def __init__(self, solvers: Sequence[Solver], schedules: Sequence[TimestepSchedule]) -> None:
        self._solvers = solvers
        self._levels = [schedule.levels() for schedule in schedules]
        self.x0: Callable[[], Floats]
        """Computes what the last step took the clean latents to be, [B, 4, h, w]."""

    def step(self, eps: Floats, index: int, z: Floats) -> Floats:
        """See `Solver.step`; arrays are [B, 4, h, w]."""
        eps = eps.copy()  # `x0` may be computed after the next run has overwritten the graph's output
        after = np.stack([solver.step(eps[b], index, z[b]) for b, solver in enumerate(self._solvers)])
        blended = [solver.x0 if isinstance(solver, X0Blend) else None for solver in self._solvers]
        self.x0 = lambda: np.stack([
            self._levels[b][index].x0(z[b], eps[b]) if x0 is None else x0 for b, x0 in enumerate(blended)
        ])  # fmt: skip
        return after


class NotFiniteError(BackendError):
    """A graph gave a NaN or an infinity: fp16 overflows at 65504."""


class Graph:
    """An engine whose outputs are checked."""

    def __init__(self, engine: Engine, before_run: Callable[[], None] | None = None) -> None:
        """Wrap an engine.

        Args:
            engine: runs the graph.
            before_run: called before each run; an exception that it raises ends the painting.
        """
        self.engine = engine
        self._before_run = before_run

    def __call__(self, feeds: Feeds) -> dict[str, Floats]:
        """Run once on `feeds` and what is bound; the next run may overwrite the outputs.

        Raises:
            NotFiniteError: an output holds a NaN or an infinity.
        """
        if self._before_run:
            self._before_run()
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
        """Run on each [1, …] of a batch, so that memory does not grow with the batch, and then give memory back.

        Args:
            name: the input.
            batch: [B, …].

        Yields:
            The outputs of each run, which the next may overwrite.
        """
        for item in batch:
            yield self({name: np.ascontiguousarray(item[None])})
        self.engine.release_memory()


class GraphDenoiser:
    """The graph `denoiser`: U-Net and ControlNet in one. Inputs that stay the same object are bound once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._bound: dict[str, Floats] = {}

    def __call__(
        self, latent: Floats, timestep: npt.NDArray[np.int64], hint: Floats, style: StageKV, control_scale: Floats
    ) -> Floats:
        """See `Denoiser.__call__`."""
        inputs = {"hint": hint, "control_scale": control_scale, **style._asdict()}
        if changed := {name: value for name, value in inputs.items() if self._bound.get(name) is not value}:
            self._graph.engine.bind_inputs(changed)
            self._bound |= changed
        return self._graph({"latent": latent, "timestep": timestep})["eps"]

    def release_memory(self) -> None:
        """See `Denoiser.release_memory`."""
        self._graph.engine.release_memory()


def encode(graph: Graph, pictures: Pixels) -> tuple[Floats, Floats]:
    """Run the graph `vae_encoder`, see `Networks.vae_encoder`."""
    images = pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    moments = [np.concatenate([outputs["mean"], outputs["std"]]) for outputs in graph.one_by_one("image", images)]
    mean, std = np.stack(moments, axis=1)
    return mean, std


def embed_edges(graph: Graph, edges: Pixels) -> Floats:
    """Run the graph `controlnet_cond`, see `Networks.controlnet_cond`."""
    planes = np.repeat(edges[:, None], 3, axis=1).astype(np.float32)
    return np.concatenate([outputs["hint"].copy() for outputs in graph.one_by_one("edges", planes)])


def decode(graph: Graph, latents: Floats) -> Pixels:
    """Run the graph `vae_decoder` or `vae_decoder_tiny`, see `Networks.vae_decoder`."""
    return np.stack([to_pixels(levels) for levels in decode_levels(graph, latents)])


def decode_levels(graph: Graph, latents: Floats) -> Iterator[Floats]:
    """Decode each latent of [B, 4, h, w] to grey levels [H, W, 3] of about 0 … 255, not rounded."""
    for outputs in graph.one_by_one("latent", latents):
        yield (outputs["image"][0].transpose(1, 2, 0) + 1) * 127.5


def to_pixels(levels: Floats) -> Pixels:
    """Grey levels as bytes: clipped to 0 … 255 and rounded."""
    pixels: Pixels = np.round(np.clip(levels, 0, 255)).astype(np.uint8)
    return pixels
