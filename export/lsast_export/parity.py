"""Proof that the exported graphs compute what torch computes.

The reference is the base as it is trained and sampled in torch: stock convolutions, contexts projected inside each
attention, one pass for each guidance half. The exported side is baked keys and values through the graphs on a
backend. Inputs are random and not degenerate: constant ones would hide a wrong softmax scale or a swapped axis.

A figure is the largest difference of an output, relative to the largest magnitude of the reference. Weights are
rounded before either side sees them and both compute in float32, so figures are about 1e-6; `ParityPlan.tolerance`
leaves room for other machines' order of summation, and is far below what any wrong operation gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsast_engines.engine import Engine, open_engine
from lsast_engines.errors import ParityError, fault_list
from lsast_engines.schedule import Schedule
from lsast_engines.solvers import make_solver
from lsast_engines.spec import DECODER, DENOISER, ENCODER, HINT, GraphSpec
from lsast_train.attention import GROUPS
from lsast_train.base import Base

from .bake import pack

Array = npt.NDArray[np.float32]
Denoise = Callable[[Array, int, int], Array]
"""(latent [B, 4, h, w], timestep, stage) → eps [G, B, 4, h, w]."""

LOOP = "loop"
"""Key of the figure of a whole denoising loop."""


@dataclass(frozen=True)
class ParityPlan:
    """What is compared."""

    shapes: tuple[tuple[int, int], tuple[int, int]] = ((2, 2), (2, 3))
    """Two picture sizes, height and width in units of the base's smallest legal size; the second is not square."""
    steps: int = 5
    """Points of the loop's schedule."""
    strength: float = 0.8
    guidance: float = 3.0
    solver: str = "ddim"
    stages: int = 10
    """Stages of the loop's random style."""
    seed: int = 0
    tolerance: float = 1e-4
    """Largest figure that passes."""

    def cases(self) -> tuple[ParityCase, ...]:
        """Batch 1 and 2 with one and two guidance rows; each of the four meets either shape."""
        return tuple(ParityCase(batch, rows, *self.shapes[(batch + rows) % 2]) for batch in (1, 2) for rows in (1, 2))


@dataclass(frozen=True)
class ParityCase:
    """One set of input shapes."""

    batch: int
    rows: int
    """Guidance rows G."""
    height: int
    """In units of the base's smallest legal size."""
    width: int


def measure_parity(
    base: Base,
    graphs: Mapping[str, Path],
    specs: Mapping[str, GraphSpec],
    plan: ParityPlan,
    backend: str = "onnxruntime",
    device: str = "auto",
) -> dict[str, float]:
    """The largest relative error of each graph and of the denoising loop, over all cases of `plan`.

    Args:
        base: the reference, with the weights as the bundle stores them.
        graphs: the ONNX files by name.
        specs: their specs by name.
        plan: what is compared.
        backend: see `lsast_engines.engine.open_engine`.
        device: likewise.

    Raises:
        BackendError: a graph cannot be loaded or run.
        ParityError: an output holds NaN or infinite values.
    """
    figures: dict[str, float] = {}
    with ExitStack() as stack, torch.no_grad():
        engines = {
            name: stack.enter_context(closing(open_engine(graphs[name], specs[name], backend, device)))
            for name in specs
        }
        generator = np.random.default_rng(plan.seed)
        for case in plan.cases():
            for name, error in _case_errors(base, engines, plan, case, generator):
                figures[name] = max(figures.get(name, 0.0), error)
    return figures


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


def reference_eps(
    base: Base,
    latent: torch.Tensor,
    edges: torch.Tensor,
    timestep: torch.Tensor,
    contexts: torch.Tensor,
    control_contexts: torch.Tensor,
    control_scale: float,
) -> torch.Tensor:
    """One guidance half in torch, on contexts: `Base.eps` with a scale on ControlNet's residuals.

    Args:
        base: the base.
        latent: [B, 4, h, w].
        edges: [B, 3, H, W].
        timestep: [B].
        contexts: [B, 3, tokens, dim] of the U-Net.
        control_contexts: the same of the ControlNet.
        control_scale: factor on the residuals.
    """
    base.control_box.fill(control_contexts)
    down, mid = base.controlnet(latent, timestep, base.control_box.down, edges, return_dict=False)
    base.unet_box.fill(contexts)
    output = base.unet(
        latent,
        timestep,
        base.unet_box.down,
        down_block_additional_residuals=[control_scale * residual for residual in down],
        mid_block_additional_residual=control_scale * mid,
        return_dict=False,
    )[0]
    return base.eps_from_output(output, latent, timestep)


def _case_errors(
    base: Base, engines: Mapping[str, Engine], plan: ParityPlan, case: ParityCase, generator: np.random.Generator
) -> Iterator[tuple[str, float]]:
    """Name and relative error of every comparison of one case."""
    facts = base.facts
    height, width = case.height * facts.multiple, case.width * facts.multiple
    image = generator.uniform(-1, 1, (case.batch, 3, height, width)).astype(np.float32)
    edges = (generator.random((case.batch, 1, height, width)) < 0.1).repeat(3, axis=1).astype(np.float32)
    scale = np.float32(generator.uniform(0.5, 1.5))
    # [stages, G, B, 3, tokens, dim]; rows of a batch may be of different styles.
    shape = (plan.stages, case.rows, case.batch, len(GROUPS), facts.tokens, base.context_dim)
    contexts = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    encoded = _run(engines[ENCODER], image=image)
    mean, std = (tensor.numpy() for tensor in base.encode(torch.from_numpy(image)))
    yield ENCODER, max(_error(encoded["mean"], mean, ENCODER), _error(encoded["std"], std, ENCODER))

    hint = _run(engines[HINT], edges=edges)["hint"]
    yield HINT, _error(hint, base.controlnet.controlnet_cond_embedding(torch.from_numpy(edges)).numpy(), HINT)

    def in_torch(latent: Array, timestep: int, stage: int) -> Array:
        inputs = torch.from_numpy(latent), torch.from_numpy(edges), torch.full((case.batch,), timestep)
        control = contexts[stage, -1]  # ControlNet always sees the style, never the null context
        halves = [reference_eps(base, *inputs, half, control, float(scale)) for half in contexts[stage]]
        stacked: Array = torch.stack(halves).numpy()
        return stacked

    unet, control = pack(base)

    def exported(latent: Array, timestep: int, stage: int) -> Array:
        rows = contexts[stage].flatten(0, 1)
        return _run(
            engines[DENOISER],
            latent=latent,
            hint=hint,
            timestep=np.full(case.batch, timestep, np.int64),
            kv_unet=unet.project(rows).unflatten(0, (case.rows, case.batch)).numpy(),
            kv_control=control.project(contexts[stage, -1]).numpy(),
            control_scale=scale,
        )["eps"]

    start = facts.latent_scale * (mean + std * generator.standard_normal(mean.shape, dtype=np.float32))
    noise = generator.standard_normal(start.shape, dtype=np.float32)
    timestep = int(generator.integers(facts.noise.train_steps))
    stage = int(generator.integers(plan.stages))
    yield DENOISER, _error(exported(noise, timestep, stage), in_torch(noise, timestep, stage), DENOISER)
    yield (
        DECODER,
        _error(_run(engines[DECODER], latent=noise)["image"], base.decode(torch.from_numpy(noise)).numpy(), DECODER),
    )
    if case.rows == 2:
        ends = [_loop(base, plan, start, noise, denoise) for denoise in (exported, in_torch)]
        yield LOOP, _error(ends[0], ends[1], LOOP)


def _loop(base: Base, plan: ParityPlan, start: Array, noise: Array, denoise: Denoise) -> Array:
    """The latent that a guided run over the plan's schedule ends with."""
    spec = base.facts.noise
    schedule = Schedule.build(spec, plan.steps, plan.strength, plan.stages, plan.solver)
    solver = make_solver(plan.solver, spec, schedule)
    x: Any = schedule.add_noise(start, noise, schedule.start_t)
    for step in schedule.steps:
        unconditional, conditional = denoise(x.astype(np.float32), step.t, step.stage)
        x = solver.step(unconditional + plan.guidance * (conditional - unconditional), step.index, x)
    result: Array = x
    return result


def _run(engine: Engine, **feeds: Any) -> dict[str, Array]:
    """Outputs that outlive the next call."""
    return {name: value.copy() for name, value in engine({k: np.asarray(v) for k, v in feeds.items()}).items()}


def _error(found: Array, expected: Array, name: str) -> float:
    """Largest difference relative to the largest magnitude expected (absolute where that is 0)."""
    for side, values in (("exported graph", found), ("torch", expected)):
        if not np.isfinite(values).all():
            raise ParityError(f"{name}: the {side} gave NaN or infinite values on random inputs; expected finite ones")
    if found.shape != expected.shape:
        raise ParityError(f"{name}: found an output of shape {found.shape}; expected {expected.shape}")
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))
