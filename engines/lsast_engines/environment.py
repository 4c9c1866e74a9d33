"""Facts of this process: installed packages and peak memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from .errors import MissingExtraError


def installed_versions(*packages: str) -> dict[str, str]:
    """Versions of those of `packages` that are installed, by name."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def package_version(package: str) -> str:
    """The version of an installed package; ``unknown`` for one that is not installed, e.g. a checkout."""
    return installed_versions(package).get(package, "unknown")


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None if the system does not report it."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent had when it forked, too
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return None


def require_extra(extra: str, *libraries: str) -> None:
    """Check that the `libraries` of the extra `extra` are installed, without importing them.

    Raises:
        MissingExtraError: for the first one that is missing.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, extra)
