"""Adding graphs to a bundle that is there, whose weights and styles stay as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lsast_engines.bundle.bundle import MANIFEST, Bundle
from lsast_engines.bundle.graph_spec import UNET_SPLIT_GRAPHS, GraphSpec
from lsast_engines.bundle.manifest import FileEntry, Manifest
from lsast_engines.errors import BundleError
from lsast_engines.files import file_sha256, replace_file
from lsast_train.base.base import open_base_parts

from ..graphs.external_weights import save_graph
from ..graphs.meta_base import skeleton
from ..graphs.unet_parts import trace_parts
from ..parity.parity import ParityPlan, plan_for, require_parity
from ..parity.unet_parts import measure_parts_parity
from ..progress import Progress, silent
from .export import WEIGHTS, require_backend

_log = logging.getLogger("lsast.export")


def add_parts(
    path: Path, backend: str = "onnxruntime", plan: ParityPlan | None = None, progress: Progress = silent
) -> Bundle:
    """Write the graphs of the denoiser's parts into the bundle at `path`, proven against torch.

    They are written under other names, compared, and renamed; the manifest follows last. Whenever this is stopped, the
    folder holds a sound bundle, with the parts or without. Parts that were there are replaced.

    Args:
        path: the bundle.
        backend: what the parts are compared with torch on.
        plan: what is compared, and the tolerance; None leaves it to `plan_for`.
        progress: told each phase.

    Raises:
        BundleError: no sound bundle, or one that cannot be written to.
        ExportError: a part that torch cannot export.
        ParityError: a part computes something else than torch.
        MissingExtraError, BackendError: the backend is not there or cannot run the graphs.
    """
    require_backend(backend)
    progress("reading")
    manifest = Bundle.open(path).manifest
    parts = open_base_parts(path)
    traced = trace_parts(skeleton(parts), progress)
    specs = {name: graph.spec for name, graph in traced.items()}
    plan = plan or plan_for(parts)
    with (
        writing_to(path),
        _scratch_names(path) as fresh,
        tempfile.TemporaryDirectory(prefix="lsast-unpacked.") as cache,
    ):
        for name, graph in traced.items():
            save_graph(graph, path / WEIGHTS, fresh[name])
        figures = measure_parts_parity(parts, fresh, specs, plan, backend, progress=progress, cache=Path(cache))
        _log.info("parity: %s", figures)
        require_parity(figures, plan.tolerance)
        progress("writing the bundle")
        return put_graphs(path, manifest, {f"{name}.onnx": file for name, file in fresh.items()}, specs, figures)


def put_graphs(
    path: Path,
    manifest: Manifest,
    files: Mapping[str, Path],
    specs: Mapping[str, GraphSpec],
    figures: Mapping[str, float],
) -> Bundle:
    """Move files that were proven into the bundle at `path`, and then declare them.

    Whenever this is stopped, the folder holds a sound bundle, with all of the graphs or with none.

    Args:
        path: the bundle.
        manifest: what it says so far; graphs of the same names are replaced.
        files: what to move, by the names to be; on the same disk.
        specs: the graphs, by name.
        figures: how near to torch each of them comes.
    """
    entries = {name: FileEntry(file_sha256(file), file.stat().st_size) for name, file in files.items()}
    bare = dataclasses.replace(
        manifest,
        graphs={name: spec for name, spec in manifest.graphs.items() if name not in specs},
        files={name: entry for name, entry in manifest.files.items() if name not in entries},
        parity={name: figure for name, figure in manifest.parity.items() if name not in specs},
    )
    if bare != manifest:
        _write_manifest(path, bare)  # before a file that it declares is replaced
    for name, file in files.items():
        file.replace(path / name)
    whole = dataclasses.replace(
        bare,
        graphs={**bare.graphs, **specs},
        files=dict(sorted({**bare.files, **entries}.items())),
        parity={**bare.parity, **figures},
    )
    _write_manifest(path, whole)
    return Bundle.open(path, verify_hashes=False)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Say of a bundle that cannot be written to what to do about it.

    Raises:
        BundleError: instead of the OSError that came out of the block.
    """
    try:
        yield
    except OSError as error:
        raise BundleError(f"cannot write to {path} ({error}); copy the bundle to a folder that is yours") from error


def _write_manifest(path: Path, manifest: Manifest) -> None:
    with replace_file(path / MANIFEST) as handle:
        handle.write(manifest.to_json().encode("utf-8"))


@contextlib.contextmanager
def _scratch_names(path: Path) -> Iterator[dict[str, Path]]:
    """A hidden file for each part, beside the weights that it refers to; what is left of them is removed."""
    token = secrets.token_hex(4)
    names = {name: path / f".{name}.{token}.onnx" for name in UNET_SPLIT_GRAPHS}
    try:
        yield names
    finally:
        for file in names.values():
            file.unlink(missing_ok=True)
