"""Adds graphs to an exported bundle; its weights and styles stay as they are."""

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from lsast_engines.backends.onnxruntime import GPU_SUFFIX
from lsast_engines.backends.registry import find_backend
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import UNET_SPLIT_GRAPHS, VAE_DECODER_TINY, GraphSpec
from lsast_engines.bundle.manifest import MANIFEST, FileEntry, Manifest
from lsast_engines.errors import BundleError
from lsast_engines.files import file_sha256, replace_file, scratch_folder
from lsast_train.base.lazy_base import open_base

from ..graphs.external_weights import save_graph
from ..graphs.gpu_graph import write_gpu_graph
from ..graphs.modules import base_on_meta
from ..graphs.small_decoder import WEIGHTS as SMALL_WEIGHTS
from ..graphs.small_decoder import SmallDecoder, save_small_decoder, trace_small_decoder
from ..graphs.trace import trace_graphs
from ..parity.parity import ParityPlan, measure_parity, measure_small_parity, plan_for, require_parity
from ..progress import Progress, no_progress
from .export import WEIGHTS

_log = logging.getLogger("lsast.export")


def add_parts(path: Path, backend: str = "onnxruntime", progress: Progress = no_progress) -> Bundle:
    """Write the graphs of the denoiser's parts into the bundle at `path`, proven against torch.

    Parts that the bundle has are replaced.

    Raises:
        BundleError: no sound bundle, or one that cannot be written to.
        ExportError: a part that torch cannot export.
        ParityError: a part computes something else than torch.
        MissingExtraError, BackendError: the backend is not installed or cannot run the graphs.
    """
    find_backend(backend, "auto", None)  # before long work
    progress("reading")
    manifest = Bundle.open(path).manifest
    base = open_base(path)
    traced = trace_graphs(base_on_meta(base), UNET_SPLIT_GRAPHS, progress)
    specs = {name: graph.spec for name, graph in traced.items()}
    plan = plan_for(base)
    token = secrets.token_hex(4)
    # Under hidden names, beside the weights that they refer to.
    fresh = {name: path / f".{name}.{token}.onnx" for name in traced}
    for_gpus = {name: path / f".{name}.{token}{GPU_SUFFIX}" for name in traced}
    with _write_guard(path), scratch_folder(path) as cache:
        try:
            for name, graph in traced.items():
                save_graph(graph, path / WEIGHTS, fresh[name])
            figures = measure_parity(base, fresh, specs, plan, backend, progress=progress, cache=cache)
            _log.info("parity: %s", figures)
            require_parity(figures, plan.tolerance)
            progress("writing the bundle")
            for name, file in fresh.items():
                write_gpu_graph(file, for_gpus[name], name)
            files = {f"{name}.onnx": file for name, file in fresh.items()}
            files |= {f"{name}{GPU_SUFFIX}": file for name, file in for_gpus.items()}
            return _commit_graphs(path, manifest, files, specs, figures)
        finally:
            for file in (*fresh.values(), *for_gpus.values()):
                file.unlink(missing_ok=True)


def add_small_decoder(
    path: Path, small: SmallDecoder, backend: str = "onnxruntime", progress: Progress = no_progress
) -> Bundle:
    """Write the graph of `small` and its weights into the bundle at `path`, proven against torch.

    A small decoder that the bundle has is replaced. A quantized bundle takes one, too: it stays in float32 and needs
    none of the bundle's weights.

    Raises:
        BundleError: no sound bundle, or one that cannot be written to.
        ExportError: torch cannot export it.
        ParityError: it computes something else than torch.
        MissingExtraError, BackendError: the backend is not installed or cannot run the graph.
    """
    find_backend(backend, "auto", None)  # before long work
    progress("reading")
    manifest = Bundle.open(path).manifest
    progress(f"tracing {VAE_DECODER_TINY}")
    traced = trace_small_decoder(small, manifest)
    with _write_guard(path), scratch_folder(path) as scratch:
        weights, graph = scratch / SMALL_WEIGHTS, scratch / f"{VAE_DECODER_TINY}.onnx"
        save_small_decoder(small, weights)
        save_graph(traced, weights, graph)
        figures = measure_small_parity(small, graph, manifest, backend, progress=progress)
        require_parity(figures, ParityPlan.tolerance)
        progress("writing the bundle")
        write_gpu_graph(graph, for_gpus := graph.with_suffix(GPU_SUFFIX), VAE_DECODER_TINY)
        files = {SMALL_WEIGHTS: weights, graph.name: graph, for_gpus.name: for_gpus}
        return _commit_graphs(path, manifest, files, {VAE_DECODER_TINY: traced.spec}, figures)


def _commit_graphs(
    path: Path,
    manifest: Manifest,
    files: Mapping[str, Path],
    specs: Mapping[str, GraphSpec],
    figures: Mapping[str, float],
) -> Bundle:
    """Move `files`, by their names in the bundle at `path`, into it, and then declare them in its manifest.

    Whenever this is interrupted, the folder holds a sound bundle, with all of the graphs or with none.
    """
    entries = {name: FileEntry(file_sha256(file), file.stat().st_size) for name, file in files.items()}
    without = dataclasses.replace(
        manifest,
        graphs={name: spec for name, spec in manifest.graphs.items() if name not in specs},
        files={name: entry for name, entry in manifest.files.items() if name not in entries},
        parity={name: figure for name, figure in manifest.parity.items() if name not in specs},
    )

    def declare(written: Manifest) -> None:
        with replace_file(path / MANIFEST) as handle:
            handle.write(written.to_json().encode("utf-8"))

    if without != manifest:
        declare(without)  # before a file that it declares is replaced
    for name, file in files.items():
        file.replace(path / name)
    files_declared = dict(sorted({**without.files, **entries}.items()))
    graphs, parity = {**without.graphs, **specs}, {**without.parity, **figures}
    declare(dataclasses.replace(without, graphs=graphs, files=files_declared, parity=parity))
    return Bundle.open(path, verify_hashes=False)


@contextlib.contextmanager
def _write_guard(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one that says how to mend it."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"cannot write to {path} ({error}); copy the bundle to a folder that is yours") from error
