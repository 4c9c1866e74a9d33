"""A disk cache of optimised and compiled graphs, so that the next process opens them without that work.

Every graph file has a folder under ``compiled/BACKEND`` of the cache folder. An entry in it is a folder, one for each
compute dtype, named by a hash of everything that the result depends on; it holds the backend's files and their SHA-256,
since a library may crash on damaged files. A new entry replaces older ones of the same graph and compute dtype.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..bundle.json_fields import parse_json
from ..bundle.manifest import MANIFEST, declared_hashes
from ..errors import shown
from ..files import (
    FOR_OTHERS_TO_READ,
    MAKE_OWN,
    cache_home,
    file_sha256,
    keep_from_others,
    make_folder,
    scratch_folder,
    written_by_others,
)

MAX_WEIGHT_BYTES = 1 << 30
"""Bytes of a bundle's weights from which its graphs are not cached: every entry holds a copy of the weights."""

SOURCE = "source.txt"
"""File beside the entries of a graph that holds the graph's path, so that they can be removed when it is gone."""

DIGESTS = "sha256.json"
"""File of an entry that holds its name, and the SHA-256 of its other files by name."""

_FORMAT = 2  # of the entries
_log = logging.getLogger("lsast.graph_cache")
_Session = TypeVar("_Session")


def open_cached(
    backend: str,
    path: Path,
    compute_dtype: str,
    environment: str,
    load: Callable[[Path], _Session],
    build: Callable[[Path | None], _Session],
) -> _Session:
    """Open a graph from the cache, or from its file and then cache it.

    Args:
        backend: its name, as `compute_dtype` a part of what identifies an entry.
        path: an ONNX file; graphs outside a bundle, and of large bundles, are not cached.
        environment: version of the backend and name of the processor.
        load: opens the graph from the files of an entry, in the folder given.
        build: opens the graph from its file and writes the files of an entry into the folder given, if any.
    """
    entry = cache_path(backend, path, compute_dtype, environment)
    if entry is None:
        return build(None)
    if others := written_by_others(entry, cache_home()):
        _tell_unused(others)
        return build(None)
    if entry.is_dir():
        try:
            _verify(entry)
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            _log.warning("cannot read %s (%s); the graph is built again", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
        else:
            try:
                return load(entry)
            except MemoryError:
                raise
            # The backends raise exceptions of no common base. The entry is whole, so it is not to blame.
            except Exception as error:
                _log.info("graph %s is not opened from %s (%s)", path, entry, error)
                return build(None)
    try:
        make_folder(entry.parent, FOR_OTHERS_TO_READ)
        with scratch_folder(entry.parent) as scratch:
            fresh = scratch / "new"
            fresh.mkdir(FOR_OTHERS_TO_READ)
            session = build(fresh)
            digests = {file.name: file_sha256(file) for file in sorted(fresh.iterdir())}
            (fresh / DIGESTS).write_text(json.dumps({"entry": entry.name, "files": digests}))
            keep_from_others(fresh)
            (entry.parent / SOURCE).write_bytes(os.fsencode(path.resolve()))
            # Another process may have been quicker, or another bundle may be in place of this one.
            if not entry.exists() and entry == cache_path(backend, path, compute_dtype, environment):
                fresh.rename(entry)
                for other in entry.parent.glob(f"{entry.name.rpartition('-')[0]}-*"):
                    if other != entry:  # of the same graph and compute dtype
                        shutil.rmtree(other, ignore_errors=True)
            return session
    except Exception as error:
        _log.info("graph %s is not cached (%s)", path, error)
    return build(None)


@functools.cache  # once, not for every graph
def _tell_unused(path: Path) -> None:
    _log.warning("%s may be written by others; the cache is not used: %s", shown(path), MAKE_OWN)


def cache_path(backend: str, path: Path, compute_dtype: str, environment: str) -> Path | None:
    """The folder of the entry for these arguments of `open_cached`, None for a graph that is not cached.

    The graph and its weights are identified by the SHA-256 that the manifest declares, and by size and time of change;
    a file that the manifest does not declare is read.
    """
    if not (path.parent / MANIFEST).is_file() or weight_bytes(path.parent) >= MAX_WEIGHT_BYTES:
        return None
    declared = declared_hashes(path.parent)
    files = [
        (file.name, declared.get(file.name) or file_sha256(file), stat.st_size, stat.st_mtime_ns)
        for file in (path, *_weight_files(path.parent))
        for stat in [file.stat()]
    ]
    folder = cache_home() / "compiled" / backend / _short_hash(str(path.resolve()))
    return folder / f"{path.stem}-{compute_dtype}-{_short_hash(f'{_FORMAT} {environment} {files}')}"


def weight_bytes(bundle: Path) -> int:
    """Bytes of the weights in a bundle's folder."""
    return sum(file.stat().st_size for file in _weight_files(bundle))


def _weight_files(bundle: Path) -> list[Path]:
    return [file for file in sorted(bundle.iterdir()) if file.suffix in (".safetensors", ".data")]


def _verify(entry: Path) -> None:
    """Raises ValueError if the files of `entry` are not those that were written, or were written for another one."""
    if not (entry / DIGESTS).is_file():  # a pipe would never end
        raise FileNotFoundError(entry / DIGESTS)
    written = parse_json((entry / DIGESTS).read_bytes())
    found = {name: file_sha256(entry / name) for name in written["files"]}
    if written["entry"] != entry.name or not found or found != written["files"]:
        raise ValueError("damaged")


def read_source(folder: Path) -> Path | None:
    """What `SOURCE` in a folder names; None if it is not there."""
    try:
        return Path(os.fsdecode((folder / SOURCE).read_bytes())) if (folder / SOURCE).is_file() else None
    except OSError:
        return None


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
