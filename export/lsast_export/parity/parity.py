"""Proof that the exported graphs compute what torch computes.

The reference is the base as it is trained and sampled in torch (`reference`): stock convolutions, contexts projected
inside each attention, one pass for each guidance half. The exported side is baked keys and values through the graphs
on a backend. Inputs are random and not degenerate: constant ones would hide a wrong softmax scale or a swapped axis.

A figure is the largest difference of an output, relative to the largest magnitude of the reference. Weights are
rounded before either side sees them and both compute in float32, so figures are about 1e-6; `ParityPlan.tolerance`
leaves room for other machines' order of summation, and is far below what any wrong operation gives.

A network is in memory once: torch goes first, its answers are kept and its networks freed, then the graphs are opened
one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsast_engines.backends.base import Engine, open_engine
from lsast_engines.bundle.graph_spec import CONTROLNET_COND, DENOISER, VAE_DECODER, VAE_ENCODER, GraphSpec
from lsast_engines.errors import ParityError, fault_list
from lsast_train.base.base import Base, BaseFacts, BaseParts
from lsast_train.base.kv_packing import pack

from ..graphs.meta_base import baking_base
from ..graphs.modules import geometry
from ..progress import Countdown, Progress, silent
from .torch_reference import Array, Case, Expected, Inputs, Loop, draw_inputs, run_torch, start_of

LOOP = "loop"
"""Key of the figure of a whole denoising loop."""

LARGE = 500_000_000
"""Weights from which a base is large: it is compared at its native size, in fewer cases."""


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


def plan_for(parts: BaseParts) -> ParityPlan:
    """The plan that suits a base: the default one, or `large_plan` from `LARGE` weights on."""
    count = sum(tensor.numel() for name in parts.names for tensor in parts.networks[name]().tensors.values())
    return large_plan(parts.facts) if count >= LARGE else ParityPlan()


def large_plan(facts: BaseFacts) -> ParityPlan:
    """Batch 2 with one and two guidance rows at small sizes, and loops of three steps at the native size and at 7/8
    of its height by 9/8 of its width: 512 x 512 and 448 x 576 pixels.
    """
    native = facts.size // facts.multiple
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
    parts: BaseParts,
    graphs: Mapping[str, Path],
    specs: Mapping[str, GraphSpec],
    plan: ParityPlan,
    backend: str = "onnxruntime",
    device: str = "auto",
    progress: Progress = silent,
    cache: Path | None = None,
) -> dict[str, float]:
    """The largest relative error of each graph and of the denoising loop, over all cases of `plan`.

    Args:
        parts: the reference, with the weights as the bundle stores them.
        graphs: the ONNX files by name.
        specs: their specs by name.
        plan: what is compared.
        backend: see `lsast_engines.backends.base.open_engine`.
        device: likewise.
        progress: told each phase, and how long the loops will take.
        cache: see `lsast_engines.backends.base.open_engine`.

    Raises:
        BackendError: a graph cannot be loaded or run.
        ParityError: an output holds NaN or infinite values.
    """
    base = baking_base(parts)
    pairs = answered(parts, plan, progress)
    figures = dict.fromkeys((VAE_ENCODER, CONTROLNET_COND, DENOISER, VAE_DECODER), 0.0)

    def note(name: str, found: Array, expected: Array) -> None:
        figures[name] = max(figures.get(name, 0.0), relative_error(found, expected, name))

    @contextmanager
    def opened(name: str) -> Iterator[Engine]:
        progress(f"comparing {name} on {backend}")
        with closing(open_engine(graphs[name], specs[name], backend, device, cache=cache)) as engine:
            yield engine

    with opened(VAE_ENCODER) as engine:
        for drawn, expected in pairs:
            outputs = run_copied(engine, image=drawn.image)
            note(VAE_ENCODER, outputs["mean"], expected.mean)
            note(VAE_ENCODER, outputs["std"], expected.std)
    hints = []
    with opened(CONTROLNET_COND) as engine:
        for drawn, expected in pairs:
            hints.append(run_copied(engine, edges=drawn.edges)["hint"])
            note(CONTROLNET_COND, hints[-1], expected.hint)
    with opened(DENOISER) as engine:
        denoiser = _Denoiser(engine, base)
        runs = sum(case.loop for case in plan.cases)
        countdown = Countdown(
            progress, f"comparing {DENOISER} on {backend}", runs * len(plan.loop.schedule(parts.facts.noise).steps)
        )
        for (drawn, expected), hint in zip(pairs, hints, strict=True):
            if expected.loop_end is None:
                eps = denoiser(drawn, hint, drawn.noise, drawn.timestep, drawn.stage)
                note(DENOISER, eps, expected.eps)
                continue
            run = start_of(plan.loop, parts.facts, drawn, expected)
            while (step := run.step) is not None:
                eps = denoiser(drawn, hint, run.latent, step.t, step.stage)
                if step.index == 0:
                    note(DENOISER, eps, expected.eps)
                run.advance(eps)
                countdown.step()
            note(LOOP, run.latent, expected.loop_end)
    with opened(VAE_DECODER) as engine:
        for drawn, expected in pairs:
            note(VAE_DECODER, run_copied(engine, latent=drawn.noise)["image"], expected.image)
    return figures


def answered(parts: BaseParts, plan: ParityPlan, progress: Progress = silent) -> list[tuple[Inputs, Expected]]:
    """The inputs of every case of `plan`, and what torch gives for them."""
    base = baking_base(parts)
    cell = parts.facts.multiple // geometry(base).factor
    generator = np.random.default_rng(plan.seed)
    inputs = [draw_inputs(case, plan.loop, parts.facts, base.context_dim, cell, generator) for case in plan.cases]
    return list(zip(inputs, run_torch(parts, inputs, plan.loop, progress), strict=True))


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


class Projections:
    """Keys and values of random contexts, as `base` projects them."""

    def __init__(self, base: Base) -> None:
        self._unet, self._control = pack(base)

    def __call__(self, drawn: Inputs, stage: int) -> tuple[Array, Array]:
        """``kv_unet`` [G, B, T, Wu] and ``kv_control`` [B, T, Wc] of a stage."""
        contexts = drawn.contexts[stage]  # [G, B, 3, tokens, dim]
        with torch.no_grad():
            kv_unet = self._unet.project(contexts.flatten(0, 1)).unflatten(0, contexts.shape[:2])
            return kv_unet.numpy(), self._control.project(contexts[-1]).numpy()


class _Denoiser:
    """The exported denoiser, fed with keys and values that `base` projects."""

    def __init__(self, engine: Engine, base: Base) -> None:
        self._engine = engine
        self._project = Projections(base)

    def __call__(self, drawn: Inputs, hint: Array, latent: Array, timestep: int, stage: int) -> Array:
        kv_unet, kv_control = self._project(drawn, stage)
        return run_copied(
            self._engine,
            latent=latent,
            hint=hint,
            timestep=np.full(len(latent), timestep, np.int64),
            kv_unet=kv_unet,
            kv_control=kv_control,
            control_scale=drawn.control_scale,
        )["eps"]


def run_copied(engine: Engine, **feeds: Any) -> dict[str, Array]:
    """Outputs that outlive the next call."""
    return {name: value.copy() for name, value in engine({k: np.asarray(v) for k, v in feeds.items()}).items()}


def relative_error(found: Array, expected: Array, name: str) -> float:
    """Largest difference relative to the largest magnitude expected (absolute where that is 0)."""
    for side, values in (("exported graph", found), ("torch", expected)):
        if not np.isfinite(values).all():
            raise ParityError(f"{name}: the {side} gave NaN or infinite values on random inputs; expected finite ones")
    if found.shape != expected.shape:
        raise ParityError(f"{name}: found an output of shape {found.shape}; expected {expected.shape}")
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))
