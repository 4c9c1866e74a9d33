"""The caches in the user's cache folder: what they hold, and removing it (`lsast cache`).

Everything here is made again when it is needed. Bundles and styles that the user keeps there are never touched.
"""

import contextlib
import os
import shutil
from collections import Counter
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
    """Remove entries; an `LsastError` names all that cannot be removed."""
    for entry in entries:
        shutil.rmtree(entry.path, ignore_errors=True)
    if kept := [str(entry.path) for entry in entries if entry.path.exists()]:
        raise LsastError(fault_list("these are in use, or not yours to remove:", kept))


def as_lines(entries: list[Entry]) -> list[str]:
    """The entries for a terminal, those of one kind and bundle together."""
    sizes: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        about = f"{entry.source or 'unknown'}{'' if entry.used else ' (gone or changed: lsast cache prune removes it)'}"
        sizes[entry.kind, about] += entry.bytes
    width = max((len(kind) for kind, _ in sizes), default=0)
    lines = [f"{size / 1e6:9.1f} MB  {kind:{width}}  {about}" for (kind, about), size in sizes.items()]
    return [*lines, f"{sum(sizes.values()) / 1e6:9.1f} MB in {cache_home()}"]


def _entries(home: Path) -> Iterator[Entry]:
    for backend in _GRAPH_CACHES:
        for folder in _folders(home / "compiled" / backend):
            graph = read_source(folder)
            yield _entry(f"graphs of {backend}", folder, graph and graph.parent, graph is not None and graph.exists())
    for folder in _folders(home / "compiled"):
        if folder.name not in _GRAPH_CACHES:  # named by the base, of which any number of bundles may be there
            yield _entry("compiled engines", folder, folder.name, used=True)
    for folder in _folders(home / "fp32"):
        weights = read_source(folder)
        yield _entry("weights in float32", folder, weights and weights.parent, is_current(folder))
    if (features := home / "eval").is_dir():
        yield _entry("features of lsast-eval", features, "pictures", used=True)


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def _entry(kind: str, folder: Path, source: object, used: bool) -> Entry:
    size = 0
    for root, _, names in os.walk(folder):  # until Python 3.13 `rglob` fails where a folder has just been removed
        for name in names:
            with contextlib.suppress(OSError):  # another process has just removed it
                size += os.lstat(os.path.join(root, name)).st_size
    return Entry(kind, folder, size, str(source or ""), used)
