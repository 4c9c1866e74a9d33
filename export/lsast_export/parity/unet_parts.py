"""Proof that the parts of a denoiser compute what torch computes, as `parity` proves the whole.

``controlnet`` is compared with the ControlNet's residuals, ``unet_full`` with the noise that diffusers' U-Net gives,
and ``unet_outer``, handed the feature that ``unet_full`` gave at the same step, with that very noise too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from lsast_engines.backends.base import Engine, open_engine
from lsast_engines.bundle.graph_spec import CONTROLNET, UNET_FULL, UNET_OUTER, GraphSpec
from lsast_train.base.base import BaseParts

from ..graphs.meta_base import baking_base
from ..progress import Progress, silent
from .parity import ParityPlan, Projections, answered, relative_error, run_copied
from .torch_reference import Array


def measure_parts_parity(
    parts: BaseParts,
    graphs: Mapping[str, Path],
    specs: Mapping[str, GraphSpec],
    plan: ParityPlan,
    backend: str = "onnxruntime",
    device: str = "auto",
    progress: Progress = silent,
    cache: Path | None = None,
) -> dict[str, float]:
    """The largest relative error of each part over all cases of `plan`, one step each.

    Arguments and errors are those of `parity.measure_parity`; of `graphs` the parts alone are opened.
    """
    single = dataclasses.replace(plan, cases=tuple(dataclasses.replace(case, loop=False) for case in plan.cases))
    pairs = answered(parts, single, progress)
    project = Projections(baking_base(parts))
    figures: dict[str, float] = {}

    def note(name: str, found: Array, expected: Array) -> None:
        figures[name] = max(figures.get(name, 0.0), relative_error(found, expected, name))

    def compare(name: str, step: Callable[[Engine, int], None]) -> None:
        progress(f"comparing {name} on {backend}")
        with closing(open_engine(graphs[name], specs[name], backend, device, cache=cache)) as engine:
            for place in range(len(pairs)):
                step(engine, place)

    keys = [project(drawn, expected.stage) for drawn, expected in pairs]
    timesteps = [np.full(len(expected.latent), expected.timestep, np.int64) for _, expected in pairs]
    residuals: list[dict[str, Array]] = []
    features: list[Array] = []

    def control(engine: Engine, place: int) -> None:
        drawn, expected = pairs[place]
        found = run_copied(
            engine,
            latent=expected.latent,
            hint=expected.hint,
            timestep=timesteps[place],
            kv_control=keys[place][1],
            control_scale=drawn.control_scale,
        )
        residuals.append(found)
        for name, wanted in zip(found, expected.residuals, strict=True):
            note(CONTROLNET, found[name], wanted)

    def deep(engine: Engine, place: int) -> None:
        _, expected = pairs[place]
        outputs = run_copied(
            engine,
            latent=expected.latent,
            timestep=timesteps[place],
            kv_unet=keys[place][0],
            **residuals[place],
        )
        features.append(outputs["feature"])
        note(UNET_FULL, outputs["eps"], expected.eps)

    def shallow(engine: Engine, place: int) -> None:
        _, expected = pairs[place]
        outer = {name: value for name, value in residuals[place].items() if name in _inputs(specs[UNET_OUTER])}
        outputs = run_copied(
            engine,
            latent=expected.latent,
            timestep=timesteps[place],
            kv_unet=keys[place][0],
            **outer,
            feature=features[place],
        )
        note(UNET_OUTER, outputs["eps"], expected.eps)

    compare(CONTROLNET, control)
    compare(UNET_FULL, deep)
    compare(UNET_OUTER, shallow)
    return figures


def _inputs(spec: GraphSpec) -> set[str]:
    return {tensor.name for tensor in spec.inputs}
