"""Proof that the exported graphs compute what torch computes.

The reference is the base as it is trained and sampled in torch (`torch_reference`): stock convolutions, contexts
projected inside each attention, one pass for each guidance half. The exported side is baked keys and values through the
graphs on a backend. Inputs are random and not degenerate: constant ones would hide a wrong softmax scale or a swapped
axis.

A figure is the largest difference of an output, relative to the largest magnitude of the reference. Weights are rounded
before either side reads them and both compute in float32, so that only the order of summation differs;
`ParityPlan.tolerance` leaves room for that on other machines, and is far below the effect of a wrong operation.

A network is in memory once: torch goes first, its outputs are kept and its networks freed, then the graphs are opened
one after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsast_engines.backends.base import Engine
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.graph_spec import (
    CONTROLNET,
    CONTROLNET_COND,
    DENOISER,
    UNET_FULL,
    UNET_OUTER,
    UNET_SPLIT_GRAPHS,
    VAE_DECODER,
    VAE_DECODER_TINY,
    VAE_ENCODER,
    GraphSpec,
    tiny_decoder_spec,
)
from lsast_engines.bundle.manifest import Manifest
from lsast_engines.diffusion import Step
from lsast_engines.errors import ParityError, fault_list
from lsast_train.base.base import BaseConfig
from lsast_train.base.lazy_base import LazyBase

from ..graphs.modules import base_on_meta, geometry
from ..graphs.small_decoder import SmallDecoder
from ..progress import Eta, Progress, no_progress
from ..styles.bake import KVProjector
from .torch_reference import Array, Case, Inputs, Loop, Run, draw_inputs, run_torch

LOOP = "loop"
"""Key of the figure of a whole denoising loop."""

LARGE = 500_000_000
"""Number of weights from which a base is compared at its native size, in fewer cases."""

_TINY_SIDES = ((1, 2, 2), (2, 1, 3))
"""Batch, height and width of the latents for a small decoder, the sides in units of the smallest legal one."""

OpenGraph = Callable[[str], Any]
"""Opens a graph by name, as a context manager of the `Engine`."""


@dataclass(frozen=True)
class ParityPlan:
    """What is compared."""

    cases: tuple[Case, ...] = (
        Case(batch=1, rows=1, height=2, width=2),
        Case(batch=1, rows=2, height=2, width=3, loop=True),
        Case(batch=2, rows=1, height=2, width=3),
        Case(batch=2, rows=2, height=2, width=2, loop=True),
    )
    """Batch 1 and 2 with one and two guidance rows, square and not."""
    loop: Loop = field(default_factory=Loop)
    """The run of the cases that loop."""
    seed: int = 0
    tolerance: float = 1e-4
    """Largest figure that passes."""


def plan_for(base: LazyBase) -> ParityPlan:
    """The plan for a base: the default one, or `large_plan` from `LARGE` weights on."""
    count = sum(tensor.numel() for name in base.names for tensor in base.networks[name]().tensors.values())
    return large_plan(base.config) if count >= LARGE else ParityPlan()


def large_plan(config: BaseConfig) -> ParityPlan:
    """Batch 2 with one and two guidance rows at small sizes, and loops of three steps at the native size and at 7/8
    of its height by 9/8 of its width: 512 x 512 and 448 x 576 pixels.
    """
    native = config.size // config.multiple
    return ParityPlan(
        (
            Case(batch=2, rows=1, height=1, width=2),
            Case(batch=2, rows=2, height=2, width=1),
            Case(batch=1, rows=2, height=native, width=native, loop=True),
            Case(batch=1, rows=2, height=native - native // 8, width=native + native // 8, loop=True),
        ),
        Loop(steps=3, strength=1.0),
    )


def measure_parity(
    base: LazyBase,
    graphs: Mapping[str, Path],
    specs: Mapping[str, GraphSpec],
    plan: ParityPlan,
    backend: str = "onnxruntime",
    device: str = "auto",
    progress: Progress = no_progress,
    cache: Path | None = None,
) -> dict[str, float]:
    """The largest relative error of each graph, and of the denoising loop, over all cases of `plan`.

    The denoiser's parts are compared if they are among `graphs`, at the first step of each case; alone, without the
    other graphs, they need no loop.

    Args:
        base: the reference, with the weights as the bundle stores them.
        graphs: the ONNX files by name; a small decoder is not compared here (`measure_small_parity`).
        backend: see `lsast_engines.backends.registry.open_engine`.
        progress: is called at each phase, and with the time that the loops will take.
        cache: see `lsast_engines.backends.registry.open_engine`.

    Raises:
        BackendError: a graph cannot be loaded or run.
        ParityError: an output holds NaN or infinite values.
    """
    if DENOISER not in graphs:
        plan = dataclasses.replace(plan, cases=tuple(dataclasses.replace(case, loop=False) for case in plan.cases))
    comparison = _Comparison(base, plan, progress)

    @contextmanager
    def opened(name: str) -> Iterator[Engine]:
        progress(f"comparing {name} on {backend}")
        with closing(open_engine(graphs[name], specs[name], backend, device, cache=cache)) as engine:
            yield engine

    if DENOISER in graphs:
        loop = len(plan.loop.schedule(base.config.noise).steps)
        steps = sum(loop if case.loop else 1 for case in plan.cases)
        comparison.compare_required(opened, Eta(progress, f"comparing {DENOISER} on {backend}", steps))
    if graphs.keys() >= set(UNET_SPLIT_GRAPHS):
        comparison.compare_parts(opened, {tensor.name for tensor in specs[UNET_OUTER].inputs})
    return comparison.figures


class _Comparison:
    """Figures of exported graphs against what torch computed for the cases of a plan."""

    def __init__(self, base: LazyBase, plan: ParityPlan, progress: Progress) -> None:
        networks = base_on_meta(base)
        cell = base.config.multiple // geometry(networks).factor
        generator = np.random.default_rng(plan.seed)
        inputs = [
            draw_inputs(case, plan.loop, base.config, networks.context_dim, cell, generator) for case in plan.cases
        ]
        self._base, self._plan = base, plan
        self._projector = KVProjector.of_base(networks, base)
        self._pairs = list(zip(inputs, run_torch(base, inputs, plan.loop, progress), strict=True))
        self.figures: dict[str, float] = {}

    def compare_required(self, opened: OpenGraph, eta: Eta) -> None:
        """Compare the graphs of every bundle, and the denoising loop."""
        self.figures |= dict.fromkeys((VAE_ENCODER, CONTROLNET_COND, DENOISER, VAE_DECODER), 0.0)
        with opened(VAE_ENCODER) as engine:
            for drawn, expected in self._pairs:
                outputs = run_copied(engine, image=drawn.image)
                self._note(VAE_ENCODER, outputs["mean"], expected.mean)
                self._note(VAE_ENCODER, outputs["std"], expected.std)
        hints = []
        with opened(CONTROLNET_COND) as engine:
            for drawn, expected in self._pairs:
                hints.append(run_copied(engine, edges=drawn.edges)["hint"])
                self._note(CONTROLNET_COND, hints[-1], expected.hint)
        with opened(DENOISER) as engine:
            for (drawn, expected), hint in zip(self._pairs, hints, strict=True):
                run = Run(self._plan.loop, self._base.config, drawn, expected.mean, expected.std)
                while (step := run.step) is not None:
                    eps = self._denoise(engine, drawn, hint, run.latent, step)
                    if step.index == 0:
                        self._note(DENOISER, eps, expected.eps)
                    run.advance(eps)
                    eta.step()
                if drawn.case.loop:
                    assert expected.loop_end is not None, "run_torch ends every loop"
                    self._note(LOOP, run.latent, expected.loop_end)
        with opened(VAE_DECODER) as engine:
            for drawn, expected in self._pairs:
                self._note(VAE_DECODER, run_copied(engine, latent=drawn.noise)["image"], expected.image)

    def compare_parts(self, opened: OpenGraph, outer_inputs: set[str]) -> None:
        """Compare the denoiser's parts: ControlNet with its residuals, the U-Net and its outermost level with eps.

        The outermost level gets the feature that the graph of the whole U-Net gave at the same step.
        """
        fed: list[dict[str, Any]] = []
        with opened(CONTROLNET) as engine:
            for drawn, expected in self._pairs:
                kv_unet, kv_control = self._project(drawn, expected.stage)
                step = {
                    "latent": expected.latent,
                    "timestep": np.full(len(expected.latent), expected.timestep, np.int64),
                }
                scaled = {"kv_control": kv_control, "control_scale": drawn.control_scale}
                residuals = run_copied(engine, **step, hint=expected.hint, **scaled)
                for found, wanted in zip(residuals.values(), expected.residuals, strict=True):
                    self._note(CONTROLNET, found, wanted)
                fed.append({**step, "kv_unet": kv_unet, **residuals})
        with opened(UNET_FULL) as engine:
            for feeds, (_, expected) in zip(fed, self._pairs, strict=True):
                outputs = run_copied(engine, **feeds)
                feeds["feature"] = outputs["feature"]
                self._note(UNET_FULL, outputs["eps"], expected.eps)
        with opened(UNET_OUTER) as engine:
            for feeds, (_, expected) in zip(fed, self._pairs, strict=True):
                outputs = run_copied(engine, **{name: feeds[name] for name in outer_inputs})
                self._note(UNET_OUTER, outputs["eps"], expected.eps)

    def _note(self, name: str, found: Array, expected: Array) -> None:
        self.figures[name] = max(self.figures.get(name, 0.0), relative_error(found, expected, name))

    def _project(self, drawn: Inputs, stage: int) -> tuple[Array, Array]:
        """``kv_unet`` [G, B, T, Wu] and ``kv_control`` [B, T, Wc] of a stage."""
        contexts = drawn.contexts[stage]  # [G, B, 3, tokens, dim]
        with torch.no_grad():
            unet, control = self._projector(contexts.flatten(0, 1))
        return unet.unflatten(0, contexts.shape[:2]).numpy(), control[-contexts.shape[1] :].numpy()

    def _denoise(self, engine: Engine, drawn: Inputs, hint: Array, latent: Array, step: Step) -> Array:
        kv_unet, kv_control = self._project(drawn, step.stage)
        return run_copied(
            engine,
            latent=latent,
            hint=hint,
            timestep=np.full(len(latent), step.t, np.int64),
            kv_unet=kv_unet,
            kv_control=kv_control,
            control_scale=drawn.control_scale,
        )["eps"]


def measure_small_parity(
    small: SmallDecoder,
    graph: Path,
    manifest: Manifest,
    backend: str = "onnxruntime",
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, float]:
    """The largest relative error of the graph of a small decoder against diffusers' own `decode`.

    Raises:
        BackendError: the graph cannot be loaded or run.
        ParityError: an output holds NaN or infinite values.
    """
    progress(f"comparing {VAE_DECODER_TINY} on {backend}")
    generator = np.random.default_rng(0)
    cell = manifest.multiple // manifest.geometry.factor
    figure = 0.0
    with closing(open_engine(graph, tiny_decoder_spec(manifest.geometry), backend, device)) as engine:
        for batch, height, width in _TINY_SIDES:
            shape = (batch, manifest.geometry.latent_channels, height * cell, width * cell)
            # Twice the deviation of the U-Net's latents, so that the decoder's clamp takes part.
            scaled = 2 * generator.standard_normal(shape, dtype=np.float32)
            with torch.no_grad():
                expected = small.autoencoder.decode(torch.from_numpy(scaled) / small.scale).sample.numpy()
            found = run_copied(engine, latent=scaled / np.float32(manifest.latent_scale))["image"]
            figure = max(figure, relative_error(found, expected, VAE_DECODER_TINY))
    return {VAE_DECODER_TINY: figure}


def require_parity(figures: Mapping[str, float], tolerance: float) -> None:
    """Raise unless every figure is at most `tolerance`.

    Raises:
        ParityError: naming every figure that is not.
    """
    faults = [
        f"{name}: found a relative error of {error:.2e}; expected at most {tolerance:.0e}"
        for name, error in figures.items()
        if not error <= tolerance
    ]
    if faults:
        raise ParityError(fault_list("the exported graphs do not compute what torch computes:", faults))


def run_copied(engine: Engine, **feeds: Any) -> dict[str, Array]:
    """Outputs of a graph, copied: the next call may overwrite the engine's own."""
    return {name: value.copy() for name, value in engine({k: np.asarray(v) for k, v in feeds.items()}).items()}


def relative_error(found: npt.NDArray[Any], expected: npt.NDArray[Any], name: str) -> float:
    """Largest difference relative to the largest magnitude expected (absolute where that is 0).

    Raises:
        ParityError: other shapes, NaN or infinite values.
    """
    for side, values in (("output", found), ("reference", expected)):
        if not np.isfinite(values).all():
            raise ParityError(f"{name}: found NaN or infinite values in the {side}; expected finite ones")
    if found.shape != expected.shape:
        raise ParityError(f"{name}: found an output of shape {found.shape}; expected {expected.shape}")
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))
