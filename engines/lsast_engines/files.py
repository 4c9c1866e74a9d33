"""Files that are written whole or not at all, and the user's folders for caches and data."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; it is renamed to `path` at the end, or deleted on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
        # mkstemp makes private files; the result gets the mode that open() would give it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cache_home() -> Path:
    """``$LSAST_HOME``, else ``lsast`` in the XDG cache folder. It may not exist, and may be deleted at any time."""
    return _home("XDG_CACHE_HOME", ".cache")


def data_home() -> Path:
    """``$LSAST_HOME``, else ``lsast`` in the XDG data folder, for what took hours to make. It may not exist."""
    return _home("XDG_DATA_HOME", ".local/share")


def _home(variable: str, default: str) -> Path:
    if home := os.environ.get("LSAST_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get(variable) or Path.home() / default) / "lsast"
