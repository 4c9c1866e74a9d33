"""Parity: the exported graphs are compared with what torch computes.

The reference is the base as it is trained and sampled in torch (`torch_reference`): stock convolutions, contexts
projected inside each attention, one pass for each guidance half. The exported side is baked keys and values through the
graphs on a backend. Inputs are random and not degenerate: constant ones would hide a wrong softmax scale or a swapped
axis.

A figure is the largest difference of an output, relative to the largest magnitude of the reference. Weights are rounded
before either side reads them and both compute in float32, so that only the order of summation differs;
`TOLERANCE` leaves room for that on other machines, and is far below the effect of a wrong operation.

torch goes first: its outputs are kept and its networks freed, then the graphs are opened one after another.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.graph_spec import (
    CONTROLNET,
    CONTROLNET_COND,
    DENOISER,
    UNET_SPLIT_GRAPHS,
    VAE_DECODER,
    VAE_DECODER_TINY,
    VAE_ENCODER,
    GraphSpec,
    tiny_decoder_spec,
)
from lsast_engines.bundle.manifest import Manifest
from lsast_engines.errors import ParityError, fault_list
from lsast_train.base.base import BaseConfig
from lsast_train.base.lazy_base import LazyBase

from ..graphs.modules import base_on_meta
from ..graphs.small_decoder import SmallDecoder
from ..progress import Eta, Progress, no_progress
from ..styles.bake import KVProjector
from .torch_reference import Array, Case, Inputs, Loop, Run, draw_inputs, run_torch

LOOP = "loop"
"""Key of the figure of a whole denoising loop."""

TOLERANCE = 1e-4
"""Largest figure that passes."""

LARGE = 500_000_000
"""Number of weights from which a base is compared at its native size, in fewer cases."""

_TINY_SIDES = ((1, 2, 2), (2, 1, 3))
"""Batch, height and width of the latents for a small decoder, the sides in units of the smallest legal one."""


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
    backend: str = "onnxruntime",
    device: str = "auto",
    progress: Progress = no_progress,
    cache: Path | None = None,
) -> dict[str, float]:
    """The largest relative error of each graph, and of the denoising loop, over all cases of `plan_for`.

    The split graphs are compared if they are among `graphs`, at the first step of each case.

    Args:
        base: the reference, with the weights as the bundle stores them.
        graphs: the ONNX files by name; a small decoder is not compared here (`measure_small_parity`).
        backend, device, cache: see `lsast_engines.backends.registry.open_engine`.
        progress: is called at each phase, and with the time that the loops will take.

    Raises:
        BackendError: a graph cannot be loaded or run.
        ParityError: an output holds NaN or infinite values.
    """
    plan, networks = plan_for(base), base_on_meta(base)
    generator = np.random.default_rng(0)
    inputs = [draw_inputs(case, plan.loop, networks, generator) for case in plan.cases]
    projector = KVProjector.of_base(networks, base)
    pairs = list(zip(inputs, run_torch(base, inputs, plan.loop, progress), strict=True))
    figures = dict.fromkeys((VAE_ENCODER, CONTROLNET_COND, DENOISER, VAE_DECODER), 0.0)

    def note(name: str, found: Array, expected: Array) -> None:
        figures[name] = max(figures.get(name, 0.0), relative_error(found, expected, name))

    def opened(name: str) -> AbstractContextManager[Callable[..., dict[str, Array]]]:
        return _opened(graphs[name], specs[name], backend, device, progress, cache)

    @torch.no_grad()
    def feeds(run: Run, drawn: Inputs) -> dict[str, Any]:
        """What the denoiser and the split graphs take at the next step of a run, but for the hint."""
        latent, timestep, contexts = run.inputs()  # contexts: [G, B, 3, tokens, dim]
        unet, control = projector(contexts.flatten(0, 1))
        return {
            "latent": latent,
            "timestep": timestep,
            "kv_unet": unet.unflatten(0, contexts.shape[:2]).numpy(),
            "kv_control": control[-contexts.shape[1] :].numpy(),
            "control_scale": drawn.control_scale,
        }

    with opened(VAE_ENCODER) as graph:
        for drawn, expected in pairs:
            outputs = graph(image=drawn.image)
            note(VAE_ENCODER, outputs["mean"], expected.mean)
            note(VAE_ENCODER, outputs["std"], expected.std)
    hints = []
    with opened(CONTROLNET_COND) as graph:
        for drawn, expected in pairs:
            hints.append(graph(edges=drawn.edges)["hint"])
            note(CONTROLNET_COND, hints[-1], expected.hint)
    steps = len(plan.loop.schedule(base.config.noise).steps)
    total = sum(steps if case.loop else 1 for case in plan.cases)
    eta = Eta(progress, f"comparing {DENOISER} on {backend}", total)
    with opened(DENOISER) as graph:
        for (drawn, expected), hint in zip(pairs, hints, strict=True):
            run = Run(plan.loop, base.config, drawn, expected)
            while (step := run.step) is not None:
                eps = graph(**feeds(run, drawn), hint=hint)["eps"]
                if step.index == 0:
                    note(DENOISER, eps, expected.eps)
                run.advance(eps)
                eta.step()
            if drawn.case.loop:
                note(LOOP, run.latent, expected.loop_end)
    with opened(VAE_DECODER) as graph:
        for drawn, expected in pairs:
            note(VAE_DECODER, graph(latent=drawn.noise)["image"], expected.image)
    if graphs.keys() >= set(UNET_SPLIT_GRAPHS):
        # Each part gets what the graph of the part before it gave.
        known = [feeds(Run(plan.loop, base.config, *pair), pair[0]) | {"hint": pair[1].hint} for pair in pairs]
        for name in UNET_SPLIT_GRAPHS:
            taken = [tensor.name for tensor in specs[name].inputs]
            with opened(name) as graph:
                for held, (_, expected) in zip(known, pairs, strict=True):
                    outputs = graph(**{key: held[key] for key in taken})
                    held |= outputs
                    wanted = expected.residuals if name == CONTROLNET else [expected.eps]
                    for found, value in zip(outputs.values(), wanted, strict=name == CONTROLNET):
                        note(name, found, value)
    return figures


def measure_small_parity(
    small: SmallDecoder,
    graph: Path,
    manifest: Manifest,
    backend: str = "onnxruntime",
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, float]:
    """The largest relative error of the graph of a small decoder against diffusers' own `decode`.

    Errors are as of `measure_parity`.
    """
    generator = np.random.default_rng(0)
    cell = manifest.multiple // manifest.geometry.factor
    figure = 0.0
    with _opened(graph, tiny_decoder_spec(manifest.geometry), backend, device, progress) as decode:
        for batch, height, width in _TINY_SIDES:
            shape = (batch, manifest.geometry.latent_channels, height * cell, width * cell)
            # Twice the deviation of the U-Net's latents, so that the decoder's clamp takes part.
            scaled = 2 * generator.standard_normal(shape, dtype=np.float32)
            with torch.no_grad():
                expected = small.autoencoder.decode(torch.from_numpy(scaled) / small.scale).sample.numpy()
            found = decode(latent=scaled / np.float32(manifest.latent_scale))["image"]
            figure = max(figure, relative_error(found, expected, VAE_DECODER_TINY))
    return {VAE_DECODER_TINY: figure}


def require_parity(figures: Mapping[str, float]) -> None:
    """Raise unless every figure is at most `TOLERANCE`.

    Raises:
        ParityError: naming every figure that is not.
    """
    faults = [
        f"{name}: found a relative error of {error:.2e}; expected at most {TOLERANCE:.0e}"
        for name, error in figures.items()
        if not error <= TOLERANCE
    ]
    if faults:
        raise ParityError(fault_list("the exported graphs do not compute what torch computes:", faults))


@contextmanager
def _opened(
    path: Path, spec: GraphSpec, backend: str, device: str, progress: Progress, cache: Path | None = None
) -> Iterator[Callable[..., dict[str, Array]]]:
    progress(f"comparing {spec.name} on {backend}")
    with closing(open_engine(path, spec, backend, device, cache=cache)) as engine:

        def run(**feeds: Any) -> dict[str, Array]:
            outputs = engine({name: np.asarray(value) for name, value in feeds.items()})
            return {name: value.copy() for name, value in outputs.items()}  # the next call may overwrite them

        yield run


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
