"""The caches in the user's cache folder: what they hold, and removing it (`lsast cache`).

Everything here is made again when it is needed. Bundles and styles that the user keeps there are never touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lsast_engines.backends.fp32_weights import is_current
from lsast_engines.backends.graph_cache import read_source
from lsast_engines.errors import LsastError, fault_list
from lsast_engines.files import cache_home

_GRAPH_CACHES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Entry:
    """A folder of a cache."""

    kind: str
    """What it holds."""
    path: Path
    bytes: int
    source: str
    """The bundle that it was made from; empty if it does not say."""
    used: bool
    """Whether that bundle is still there, so that it may be used again."""


def cache_entries() -> list[Entry]:
    """All entries, the largest first."""
    return sorted(_entries(cache_home()), key=lambda entry: -entry.bytes)


def remove(entries: list[Entry]) -> None:
    """Remove entries.

    Raises:
        LsastError: some cannot be removed; all of them at once.
    """
    for entry in entries:
        shutil.rmtree(entry.path, ignore_errors=True)
    if kept := [str(entry.path) for entry in entries if entry.path.exists()]:
        raise LsastError(fault_list("these are in use, or not yours to remove:", kept))


def as_lines(entries: list[Entry]) -> list[str]:
    """The entries for a terminal, those of one kind and bundle together."""
    sizes: dict[tuple[str, str], int] = {}
    for entry in entries:
        about = f"{entry.source or 'unknown'}{'' if entry.used else ' (gone or changed: lsast cache prune removes it)'}"
        sizes[entry.kind, about] = sizes.get((entry.kind, about), 0) + entry.bytes
    width = max((len(kind) for kind, _ in sizes), default=0)
    lines = [f"{size / 1e6:9.1f} MB  {kind:{width}}  {about}" for (kind, about), size in sizes.items()]
    return [*lines, f"{sum(sizes.values()) / 1e6:9.1f} MB in {cache_home()}"]


def _entries(home: Path) -> Iterator[Entry]:
    for backend in _folders(home / "compiled"):
        if backend.name in _GRAPH_CACHES:
            for folder in _folders(backend):
                graph = read_source(folder)
                source = "" if graph is None else str(graph.parent)
                used = graph is not None and graph.exists()
                yield Entry(f"graphs of {backend.name}", folder, _size(folder), source, used)
        else:  # named by the base, of which any number of bundles may be there
            yield Entry("compiled engines", backend, _size(backend), backend.name, used=True)
    for folder in _folders(home / "fp32"):
        weights = read_source(folder)
        source = "" if weights is None else str(weights.parent)
        yield Entry("weights in float32", folder, _size(folder), source, is_current(folder))
    if (features := home / "eval").is_dir():
        yield Entry("features of lsast-eval", features, _size(features), "pictures", used=True)


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def _size(folder: Path) -> int:
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process has just removed it
                size += os.lstat(os.path.join(root, name)).st_size
    return size
