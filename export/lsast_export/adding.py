"""Adding the denoiser's parts to a bundle that is there, whose weights and styles stay as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lsast_engines.bundle import MANIFEST, Bundle
from lsast_engines.errors import BundleError
from lsast_engines.files import file_sha256, replace_file
from lsast_engines.manifest import FileEntry, Manifest
from lsast_engines.spec import PARTS
from lsast_train.base import open_base_parts

from .exporter import WEIGHTS, require_backend
from .parity import ParityPlan, plan_for, require_parity
from .parts import trace_parts
from .parts_parity import measure_parts_parity
from .progress import Progress, silent
from .skeleton import skeleton
from .weights import save_graph

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
    try:
        with _scratch_names(path) as fresh, tempfile.TemporaryDirectory(prefix="lsast-unpacked.") as cache:
            for name, graph in traced.items():
                save_graph(graph, path / WEIGHTS, fresh[name])
            figures = measure_parts_parity(parts, fresh, specs, plan, backend, progress=progress, cache=Path(cache))
            _log.info("parity: %s", figures)
            require_parity(figures, plan.tolerance)
            progress("writing the bundle")
            files = {f"{name}.onnx": FileEntry(file_sha256(file), file.stat().st_size) for name, file in fresh.items()}
            bare = dataclasses.replace(
                manifest,
                graphs={name: spec for name, spec in manifest.graphs.items() if name not in PARTS},
                files={name: entry for name, entry in manifest.files.items() if name not in files},
                parity={name: figure for name, figure in manifest.parity.items() if name not in PARTS},
            )
            if bare != manifest:
                _write_manifest(path, bare)  # before a file that it declares is replaced
            for name, file in fresh.items():
                file.replace(path / f"{name}.onnx")
    except OSError as error:
        raise BundleError(f"cannot write to {path} ({error}); copy the bundle to a folder that is yours") from error
    whole = dataclasses.replace(
        bare,
        graphs={**bare.graphs, **specs},
        files=dict(sorted({**bare.files, **files}.items())),
        parity={**bare.parity, **figures},
    )
    _write_manifest(path, whole)
    return Bundle.open(path, verify_hashes=False)


def _write_manifest(path: Path, manifest: Manifest) -> None:
    with replace_file(path / MANIFEST) as handle:
        handle.write(manifest.to_json().encode("utf-8"))


@contextlib.contextmanager
def _scratch_names(path: Path) -> Iterator[dict[str, Path]]:
    """A hidden file for each part, beside the weights that it refers to; what is left of them is removed."""
    token = secrets.token_hex(4)
    names = {name: path / f".{name}.{token}.onnx" for name in PARTS}
    try:
        yield names
    finally:
        for file in names.values():
            file.unlink(missing_ok=True)
