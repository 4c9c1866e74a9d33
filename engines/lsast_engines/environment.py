"""Facts of this process and its machine: installed packages, peak memory, and what the processor has."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

from .errors import MissingExtraError

PROCESSOR = "LSAST_PROCESSOR"
"""Environment variable that replaces `cpu_features`, e.g. ``avx2 avx512_bf16``: shows what ``auto`` would choose on
another machine, and keeps tests alike on all."""

_NUMPY_FEATURES = {
    "AVX2": ("avx2",),
    "AVX512F": ("avx512f",),
    "AVX512VNNI": ("avx512_vnni",),
    "AVX512BF16": ("avx512_bf16",),
    "AVX512_ICL": ("avx512_vnni",),
    "AVX512_SPR": ("avx512_bf16", "avx512_fp16"),  # older versions of NumPy name no single ones
    "ASIMD": ("asimd",),
    "ASIMDHP": ("asimdhp",),
    "ASIMDDP": ("asimddp",),
    "SVE": ("sve",),
}
"""Linux' names of what NumPy finds."""


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


def cpu_features() -> frozenset[str]:
    """Instruction sets of the processor by Linux' names, such as ``avx2``, ``avx512_bf16``, ``amx_bf16``, ``asimd``.

    On Linux all of them, elsewhere those that NumPy looks for, which has no AMX. Empty if neither can tell.
    """
    if (given := os.environ.get(PROCESSOR)) is not None:
        return frozenset(given.replace(",", " ").split())
    if facts := cpu_facts():
        return frozenset(facts.get("flags", facts.get("Features", "")).split())
    with contextlib.suppress(ImportError, AttributeError):  # NumPy 1 keeps them elsewhere
        found = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
        return frozenset(name for key, names in _NUMPY_FEATURES.items() if found.get(key) for name in names)
    return frozenset()


@functools.cache
def cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor, e.g. its ``model name``; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return {}
    lines = info.read_text().partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


@functools.cache
def processor() -> str:
    """The model and all instruction sets of the processor, as far as the system tells."""
    names = ("model name", "flags", "Features", "CPU part")
    facts = [cpu_facts()[name] for name in names if name in cpu_facts()]
    return " ".join([platform.machine(), *(facts or [platform.processor()])])
