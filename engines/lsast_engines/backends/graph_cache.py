"""Where backends keep what they made of a graph, so that the next process need not make it again.

One folder for each graph file, under ``compiled/BACKEND`` of the cache folder; in it one entry for each graph and
arithmetic, named by a hash of all that it depends on. Whatever of that changes puts another in its place.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from ..bundle.bundle import MANIFEST
from ..files import cache_home

LIMIT = 1 << 30
"""Bytes of a bundle's weights from which nothing is kept of its graphs: it would take gigabytes."""

_WEIGHTS = (".safetensors", ".data")
"""Suffixes of the files that graphs may refer into."""


def place(backend: str, path: Path, compute_dtype: str, machine: str) -> Path | None:
    """The name, without suffix, of what is kept of the graph file `path`; None where nothing is.

    It costs no reading of the weights: files are told apart by size and time.

    Args:
        backend: whose.
        path: an ONNX file; only those of a bundle with less than `LIMIT` bytes of weights are kept.
        compute_dtype: what the graph computes in.
        machine: version of the backend, and what it computes on.
    """
    weights = [file for file in sorted(path.parent.iterdir()) if file.suffix in _WEIGHTS]
    if not (path.parent / MANIFEST).is_file() or sum(file.stat().st_size for file in weights) >= LIMIT:
        return None
    found = [(file.name, stat.st_size, stat.st_mtime_ns) for file in (path, *weights) for stat in [file.stat()]]
    folder = cache_home() / "compiled" / backend / _short(str(path.resolve()))
    return folder / f"{path.stem}-{compute_dtype}-{_short(f'{machine} {found}')}"


def remove_others(kept: Path) -> None:
    """Remove what `kept`, a file or a folder beside its like, takes the place of."""
    graph, compute_dtype, _ = kept.stem.split("-")
    for other in kept.parent.glob(f"{graph}-{compute_dtype}-*{kept.suffix}"):
        if other == kept:
            continue
        if other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
        else:
            other.unlink(missing_ok=True)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
