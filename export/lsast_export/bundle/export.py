"""Export of a whole bundle: round, bake, trace, prove, write. What fails leaves nothing behind.

No more than one network, or the session of one graph, is in memory at any time: weights go from file to file a tensor
at a time, tracing needs none, baking a few (`skeleton`), and torch has left when the graphs are opened (`parity`).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsast_engines.backends.base import EXTRAS, available_backends
from lsast_engines.bundle.bundle import NULL_STYLE, STYLES, Bundle
from lsast_engines.bundle.graph_spec import UNET_SPLIT_GRAPHS, GraphSpec, graph_specs
from lsast_engines.bundle.manifest import Manifest, StorageDtype
from lsast_engines.environment import package_version
from lsast_engines.errors import ExportError, MissingExtraError, fault_list
from lsast_train.base.base import Base, BaseParts, open_base_parts, save_base
from lsast_train.base.kv_packing import pack
from lsast_train.prompts.prompt_file import Prompts
from lsast_train.prompts.prompt_space import STAGES

from ..graphs.external_weights import save_graph
from ..graphs.meta_base import baking_base, skeleton
from ..graphs.modules import GRAPHS, geometry, graph_module
from ..graphs.trace import OPSET, TracedGraph, trace
from ..graphs.unet_parts import trace_parts
from ..parity.parity import ParityPlan, measure_parity, plan_for, require_parity
from ..parity.unet_parts import measure_parts_parity
from ..progress import Progress, silent
from ..styles.bake import bake_null_style, manifest_layers
from ..styles.install import EXPORTED_FROM, bake_prompts, check_prompts

WEIGHTS = "base.safetensors"
"""The file of all weights, shared by the graphs and by training."""

DTYPES: dict[StorageDtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Element type of the stored weights by precision."""

_log = logging.getLogger("lsast.export")


@dataclass(frozen=True)
class ExportOptions:
    """How a bundle is exported."""

    storage_dtype: StorageDtype = "fp16"
    """Storage of the weights; arithmetic is float32 in either case (see `weights`)."""
    backend: str = "onnxruntime"
    """Backend that the graphs are compared with torch on."""
    plan: ParityPlan | None = None
    """What is compared, and the tolerance; None leaves it to `plan_for`."""
    parts: bool = False
    """Whether the bundle gets the denoiser's parts (`parts`), too; they need no weights of their own."""


def default_options(base: Base | BaseParts, styles: Sequence[str]) -> dict[str, Any]:
    """The manifest's `defaults` for a base that says nothing of its own.

    A bundle without a style names ``none``: running it without `--style` then lists the styles there are.
    """
    return {
        "style": styles[0] if styles else "none",
        "steps": 20,
        "strength": 0.7,
        "guidance": 3.0,
        "control": 1.0,
        "solver": "dpmpp2m",
        "size": base.facts.size,
    }


def trace_graphs(base: Base, progress: Progress = silent) -> dict[str, TracedGraph]:
    """Trace every graph of `base`, which may be a `skeleton`; the result has no weights and serves every precision.

    Raises:
        ExportError: a graph that torch cannot export, or one of other inputs and outputs than specified.
    """
    widths = geometry(base)
    specs = graph_specs(widths)
    traced = {}
    for name in GRAPHS:
        progress(f"tracing {name}")
        with graph_module(base, name) as module:
            traced[name] = trace(module, specs[name], base.facts.multiple, widths.factor)
    return traced


def export_bundle(
    base: Base | BaseParts,
    out: Path,
    styles: Sequence[Prompts] = (),
    options: ExportOptions | None = None,
    defaults: Mapping[str, Any] | None = None,
    traced: Mapping[str, TracedGraph] | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Write the bundle of `base` and `styles` to the folder `out`.

    Args:
        base: the base; it is left as it is, also where the bundle's weights are rounded. `BaseParts` need less memory.
        out: the folder. A bundle there is replaced, its other styles are kept.
        styles: prompts that were learned on `base`.
        options: how; the defaults if None.
        defaults: what to put into the manifest's `defaults` over those of `default_options`.
        traced: graphs of this very base that `trace_graphs` gave before, to write several precisions from one trace.
        progress: told each phase.

    Raises:
        ExportError: a graph cannot be exported, styles of different stages.
        ParityError: a graph computes something else than torch.
        StyleError: prompts that do not fit the base.
        BundleError: `out` is taken by something else.
        MissingExtraError, BackendError: the backend is not there or cannot run the graphs.
    """
    options = options or ExportOptions()
    require_backend(options.backend)
    for prompts in styles:
        check_prompts(prompts, base)
    stages = _common_stages(styles)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.export.") as scratch:
        folder = Path(scratch)
        progress("storing weights")
        save_base(_with_origin(base), folder, DTYPES[options.storage_dtype])
        stored = open_base_parts(folder)
        progress("baking styles")
        projections = baking_base(stored)
        baked = [bake_prompts(projections, prompts) for prompts in styles]
        null_style = bake_null_style(projections)
        del projections
        empty = skeleton(stored)
        traced = traced or trace_graphs(empty, progress)
        if options.parts and not traced.keys() >= set(UNET_SPLIT_GRAPHS):
            traced = {**traced, **trace_parts(empty, progress)}
        for name, graph in traced.items():
            save_graph(graph, folder / WEIGHTS, folder / f"{name}.onnx")
        specs = {name: graph.spec for name, graph in traced.items()}
        paths = {name: folder / f"{name}.onnx" for name in traced}
        plan = options.plan or plan_for(stored)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.unpacked.") as cache:
            figures = measure_parity(stored, paths, specs, plan, options.backend, progress=progress, cache=Path(cache))
            if traced.keys() >= set(UNET_SPLIT_GRAPHS):
                figures |= measure_parts_parity(
                    stored, paths, specs, plan, options.backend, progress=progress, cache=Path(cache)
                )
        _log.info("parity: %s", figures)
        require_parity(figures, plan.tolerance)
        names = [style.name for style in baked]
        manifest = _manifest(
            empty, options, plan, stages, {**default_options(stored, names), **(defaults or {})}, figures, specs
        )
        progress("writing the bundle")
        null_style.save(folder / NULL_STYLE)
        for style in baked:
            style.save(folder / STYLES / f"{style.name}.safetensors")
        sources = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        return Bundle.write(out, manifest, sources, replace=True, consume=True)


def require_backend(backend: str) -> None:
    """Make sure, before minutes are spent, that the backend for the comparison is installed.

    Raises:
        MissingExtraError: it is not, or with ``auto`` none is.
    """
    there = available_backends()
    if not there or (backend in EXTRAS and backend not in there):
        library = backend if backend in EXTRAS else "onnxruntime"
        raise MissingExtraError(library, EXTRAS[library])


def _with_origin(base: Base | BaseParts) -> Base | BaseParts:
    """`base` with its fingerprint among its facts: rounding makes another one, but prompts learned on it still fit."""
    origins = " ".join(dict.fromkeys([*base.facts.training.get(EXPORTED_FROM, "").split(), base.fingerprint]))
    noted = copy.copy(base)  # shares the networks
    noted.facts = dataclasses.replace(base.facts, training={**base.facts.training, EXPORTED_FROM: origins})
    return noted


def _common_stages(styles: Sequence[Prompts]) -> int:
    """The stages that all `styles` have; `STAGES` for none."""
    found = {prompts.name: len(prompts.prompts) for prompts in styles}
    if len(set(found.values())) > 1:
        faults = [f"{name}: {stages} stages" for name, stages in found.items()]
        raise ExportError(fault_list("styles of one bundle must have equally many stages; found:", faults))
    return next(iter(found.values()), STAGES)


def _manifest(
    base: Base,
    options: ExportOptions,
    plan: ParityPlan,
    stages: int,
    defaults: dict[str, Any],
    figures: dict[str, float],
    specs: dict[str, GraphSpec],
) -> Manifest:
    facts = base.facts
    widths = geometry(base)
    return Manifest(
        name=facts.name,
        family=facts.family,
        fingerprint=base.fingerprint,
        height=facts.size,
        width=facts.size,
        latent_scale=facts.latent_scale,
        storage_dtype=options.storage_dtype,
        noise=facts.noise,
        stages=stages,
        tokens=facts.tokens,
        geometry=widths,
        attention_layers=manifest_layers(pack(base)),
        graphs=specs,
        defaults=defaults,
        lsast_version=package_version("lsast"),
        parity=figures,
        source={
            **facts.training,
            "opset": str(OPSET),
            "parity_backend": options.backend,
            "parity_tolerance": f"{plan.tolerance:g}",
            **{library: package_version(library) for library in ("torch", "diffusers", "onnx", "onnxscript")},
        },
        multiple=facts.multiple,
    )
