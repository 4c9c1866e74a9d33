"""Adds a small decoder to an exported bundle, whose other graphs, weights and styles stay as they are."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from lsast_engines.backends.onnxruntime import GPU_SUFFIX
from lsast_engines.backends.registry import find_backend
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import VAE_DECODER_TINY, GraphSpec
from lsast_engines.bundle.manifest import MANIFEST, FileEntry, Manifest
from lsast_engines.errors import BundleError
from lsast_engines.files import file_sha256, replace_file, scratch_folder

from ..graphs.external_weights import save_graph
from ..graphs.gpu_graph import write_gpu_graph
from ..graphs.small_decoder import WEIGHTS as SMALL_WEIGHTS
from ..graphs.small_decoder import SmallDecoder, save_small_decoder, trace_small_decoder
from ..parity.parity import measure_small_parity, require_parity
from ..progress import Progress, no_progress


def add_small_decoder(
    path: Path, small: SmallDecoder, backend: str = "onnxruntime", progress: Progress = no_progress
) -> Bundle:
    """Write the graph of `small` and its weights into the bundle at `path`, compared with torch.

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
    try:
        with scratch_folder(path) as scratch:
            weights, graph = scratch / SMALL_WEIGHTS, scratch / f"{VAE_DECODER_TINY}.onnx"
            save_small_decoder(small, weights)
            save_graph(traced, weights, graph)
            figures = measure_small_parity(small, graph, manifest, backend, progress=progress)
            require_parity(figures)
            progress("writing the bundle")
            write_gpu_graph(graph, for_gpus := graph.with_suffix(GPU_SUFFIX), VAE_DECODER_TINY)
            return _commit(path, manifest, (weights, graph, for_gpus), traced.spec, figures)
    except OSError as error:
        raise BundleError(f"cannot write to {path} ({error}); copy the bundle to a folder that is yours") from error


def _commit(
    path: Path, manifest: Manifest, files: Sequence[Path], spec: GraphSpec, figures: Mapping[str, float]
) -> Bundle:
    """Move `files` into the bundle at `path`, and then declare them in its manifest.

    Whenever this is interrupted, the folder holds a sound bundle, with all of them or with none.
    """
    entries = {file.name: FileEntry(file_sha256(file), file.stat().st_size) for file in files}
    without = dataclasses.replace(
        manifest,
        graphs={name: other for name, other in manifest.graphs.items() if name != spec.name},
        files={name: entry for name, entry in manifest.files.items() if name not in entries},
        parity={name: figure for name, figure in manifest.parity.items() if name != spec.name},
    )

    def declare(written: Manifest) -> None:
        with replace_file(path / MANIFEST) as handle:
            handle.write(written.to_json().encode("utf-8"))

    if without != manifest:
        declare(without)  # before a file that it declares is replaced
    for file in files:
        file.replace(path / file.name)
    declare(
        dataclasses.replace(
            without,
            graphs={**without.graphs, spec.name: spec},
            files=dict(sorted({**without.files, **entries}.items())),
            parity={**without.parity, **figures},
        )
    )
    return Bundle.open(path, verify_hashes=False)
