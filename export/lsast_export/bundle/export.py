"""Export of a whole bundle: round weights, bake styles, trace graphs, compare with torch, write. A failed export leaves
nothing behind.

At most one network, or the session of one graph, is in memory at any time: weights are copied from file to file tensor
by tensor, tracing needs none, baking reads one matrix at a time, and torch has freed its networks when the graphs are
opened (`parity`).
"""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsast.options.style_mix import Mix
from lsast_engines.backends.onnxruntime import GPU_SUFFIX
from lsast_engines.backends.registry import find_backend
from lsast_engines.bundle.bundle import NULL_STYLE_FILE, PROMPTS, STYLES, Bundle, require_free
from lsast_engines.bundle.graph_spec import VAE_DECODER_TINY
from lsast_engines.bundle.manifest import MANIFEST, Manifest, StorageDtype
from lsast_engines.environment import package_version
from lsast_engines.errors import ExportError, LsastError, fault_list
from lsast_engines.files import scratch_folder
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import LazyBase, open_base, save_base
from lsast_train.prompts.matrix_index import STAGES
from lsast_train.prompts.prompt_file import EXPORTED_FROM, Prompts, check_fingerprint, load_prompts, save_prompts

from ..graphs.external_weights import save_graph
from ..graphs.gpu_graph import write_gpu_graph
from ..graphs.modules import base_on_meta, geometry
from ..graphs.small_decoder import WEIGHTS as SMALL_WEIGHTS
from ..graphs.small_decoder import SmallDecoder, read_small_decoder
from ..graphs.trace import OPSET, TracedGraph, trace_graphs
from ..parity.parity import TOLERANCE, measure_parity, require_parity
from ..progress import Progress, no_progress
from ..styles.bake import KVProjector, bake_null_style, bake_prompts

WEIGHTS = "base.safetensors"
"""The file of all weights, which the graphs and training share."""

DTYPES: dict[StorageDtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""torch's dtype of the stored weights."""

_log = logging.getLogger("lsast.export")


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export."""

    storage_dtype: StorageDtype = "fp16"
    """Data type that weights are stored in; graphs compute in float32 (see `external_weights`)."""
    backend: str = "onnxruntime"
    """Backend that the graphs are compared with torch on."""


def export_bundle(
    base: Base | LazyBase,
    out: Path,
    styles: Sequence[Prompts] = (),
    options: ExportOptions | None = None,
    defaults: Mapping[str, Any] | None = None,
    traced: Mapping[str, TracedGraph] | None = None,
    progress: Progress = no_progress,
) -> Bundle:
    """Write the bundle of `base` and `styles` to the folder `out`.

    Args:
        base: the base, which is not changed; a `LazyBase` needs less memory.
        out: the folder. A bundle there is replaced, its other styles are kept; without `styles` its default one, too.
        styles: prompts that were learned on `base`.
        defaults: options in the manifest, in place of our own.
        traced: graphs of this base from `trace_graphs`, to write several storage types from one trace.

    Raises:
        ExportError: a graph cannot be exported; styles have different numbers of stages.
        ParityError: a graph computes something else than torch.
        StyleError: prompts that do not fit the base.
        BundleError: `out` is no bundle and not empty.
        MissingExtraError, BackendError: the backend is not installed or cannot run the graphs.
    """
    options = options or ExportOptions()
    require_free(out, replace=True)
    find_backend(options.backend, "auto", None)  # before long work
    for prompts in styles:
        what = f"style {prompts.name!r}"
        check_fingerprint(prompts.base, what, base.config.name, base.fingerprint, base.config.training)
    stages = _common_stages(styles)
    with scratch_folder(out.parent) as folder:
        progress("storing weights")
        save_base(_with_origin(base), folder, DTYPES[options.storage_dtype])
        stored = open_base(folder)
        progress("baking styles")
        empty = base_on_meta(stored)
        projector = KVProjector.of_base(empty, stored)
        baked = [bake_prompts(projector, prompts) for prompts in styles]
        null_style = bake_null_style(projector)
        graphs = traced or trace_graphs(empty, progress=progress)
        for name, graph in graphs.items():
            save_graph(graph, folder / WEIGHTS, folder / f"{name}.onnx")
            write_gpu_graph(folder / f"{name}.onnx", folder / f"{name}{GPU_SUFFIX}", name)
        specs = {name: graph.spec for name, graph in graphs.items()}
        paths = {name: folder / f"{name}.onnx" for name in graphs}
        with scratch_folder(out.parent) as cache:
            figures = measure_parity(stored, paths, specs, options.backend, progress=progress, cache=cache)
        _log.info("parity: %s", figures)
        require_parity(figures)
        config = stored.config
        libraries = ("torch", "diffusers", "onnx", "onnxscript")
        manifest = Manifest(
            name=config.name,
            family=config.family,
            fingerprint=stored.fingerprint,
            height=config.size,
            width=config.size,
            latent_scale=config.latent_scale,
            storage_dtype=options.storage_dtype,
            noise=config.noise,
            stages=stages,
            tokens=config.tokens,
            geometry=geometry(empty),
            attention_layers=projector.layers,
            graphs=specs,
            defaults={
                "style": baked[0].name if baked else _default_style(out, stored.fingerprint),
                "steps": 20,
                "strength": 0.7,
                "guidance": 3.0,
                "control_scale": 1.0,
                "solver": "dpmpp2m",
                "size": config.size,
                **(defaults or {}),
            },
            lsast_version=package_version("lsast"),
            parity=figures,
            source={
                **config.training,
                "opset": str(OPSET),
                "parity_backend": options.backend,
                "parity_tolerance": f"{TOLERANCE:g}",
                **{library: package_version(library) for library in libraries},
            },
            multiple=config.multiple,
        )
        del projector
        progress("writing the bundle")
        null_style.save(folder / NULL_STYLE_FILE)
        for style in baked:
            style.save(folder / STYLES / f"{style.name}.safetensors")
        for prompts in styles:
            save_prompts(prompts, folder / PROMPTS / f"{prompts.name}.prompts.safetensors")
        sources = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        return Bundle.write(out, manifest, sources, replace=True, consume=True)


def inherited_from(folder: Path | None) -> tuple[Mapping[str, Any], SmallDecoder | None, Sequence[Prompts]]:
    """What an export from `folder` takes over: nothing, unless a bundle is there.

    Returns:
        The defaults of its manifest, its small decoder, and the prompts of its styles.

    Raises:
        BundleError, ExportError, TrainingError, StyleError: a manifest, a small decoder or prompts that cannot be read.
    """
    if folder is None or not (folder / MANIFEST).is_file():
        return {}, None, ()
    manifest = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"), str(folder / MANIFEST))
    has_small = VAE_DECODER_TINY in manifest.graphs
    small = read_small_decoder(folder / SMALL_WEIGHTS, manifest) if has_small else None
    styles = [load_prompts(file) for file in sorted((folder / PROMPTS).glob("*.prompts.safetensors"))]
    baked = {file.stem for file in (folder / STYLES).glob("*.safetensors")}
    if lost := sorted(baked - {prompts.name for prompts in styles}):
        _log.warning("styles of %s that have no prompts there are left out: %s", folder, ", ".join(lost))
    return manifest.defaults, small, styles


def _default_style(folder: Path, fingerprint: str) -> str:
    """The default style of the bundle in `folder`, if it is there, can be read, and is of this base; else ``none``,
    with which a run without `--style` lists the styles that there are."""
    with contextlib.suppress(OSError, ValueError, LsastError):
        manifest = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"), str(folder))
        style = str(manifest.defaults.get("style", "none"))
        files = [folder / STYLES / f"{term.style}.safetensors" for term in Mix.parse(style).terms]
        if manifest.fingerprint == fingerprint and all(file.is_file() for file in files):
            return style
    return "none"


def _with_origin(base: Base | LazyBase) -> Base | LazyBase:
    """`base` with its fingerprint in its config: prompts that were learned on it fit the rounded base, too."""
    origins = " ".join(dict.fromkeys([*base.config.training.get(EXPORTED_FROM, "").split(), base.fingerprint]))
    noted = copy.copy(base)  # shares the networks
    noted.config = dataclasses.replace(base.config, training={**base.config.training, EXPORTED_FROM: origins})
    return noted


def _common_stages(styles: Sequence[Prompts]) -> int:
    """The stages that all `styles` have; `STAGES` for none."""
    found = {prompts.name: len(prompts.prompts) for prompts in styles}
    if len(set(found.values())) > 1:
        faults = [f"{name}: {stages} stages" for name, stages in found.items()]
        raise ExportError(fault_list("styles of one bundle must have equally many stages; found:", faults))
    return next(iter(found.values()), STAGES)
