"""Facts of this process and its machine: installed packages, peak memory, and what the processor has."""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import sys
from pathlib import Path

from .errors import MissingExtraError

PROCESSOR = "LSAST_PROCESSOR"
"""Environment variable that replaces `cpu_features`, e.g. ``avx2 avx512_bf16``: shows what ``auto`` would choose on
another machine, and keeps tests alike on all."""


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
    """Check that the `libraries` of an extra are installed, without importing them; a `MissingExtraError` names the
    first one that is missing."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, extra)


def cpu_features() -> frozenset[str]:
    """The instruction sets that ``auto`` goes by: those that the variable `PROCESSOR` names, else the real ones."""
    given = os.environ.get(PROCESSOR)
    return real_cpu_features() if given is None else frozenset(given.replace(",", " ").split())


def real_cpu_features() -> frozenset[str]:
    """Instruction sets of the processor by Linux' names, such as ``avx2``, ``amx_bf16``, ``asimd``: on Linux all,
    elsewhere ``avx512_bf16`` at most, which NumPy looks for; empty if neither can tell."""
    if facts := cpu_facts():
        return frozenset(facts.get("flags", facts.get("Features", "")).split())
    with contextlib.suppress(ImportError, AttributeError):  # NumPy 1 keeps them elsewhere
        found = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
        if found.get("AVX512BF16") or found.get("AVX512_SPR"):  # older versions of NumPy name no single ones
            return frozenset({"avx512_bf16"})
    return frozenset()


def core_limit(root: Path = Path("/")) -> int | None:
    """Physical cores that this process may keep busy, where that is fewer than there are; None without a limit.

    Limits are the affinity mask (`taskset`, a container's set of processors) and the quota of control groups, rounded
    up (`docker run --cpus 1.5`). Backends would count all cores, and threads that share one hold each other up. Linux
    only; `root` of the file system is another in tests.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = set()
    for processor in os.sched_getaffinity(0):
        siblings = root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(processor))
    quotas = [math.ceil(quota) for quota in _cpu_quotas(root)]
    limit = max(1, min([len(cores), *quotas]))
    everything = len(os.sched_getaffinity(0)) == os.cpu_count()
    return None if everything and limit == len(cores) else limit


def _cpu_quotas(root: Path) -> list[float]:
    """The quotas of this process's control groups and the groups around them, in processors."""
    groups = root / "proc/self/cgroup"
    found = []
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        place = top / path.lstrip("/")
        for folder in (place, *place.parents[: len(place.parts) - len(top.parts)]):
            with contextlib.suppress(OSError, ValueError):  # no limit, or a path outside of this container
                if controllers:  # version 1
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if float(quota) > 0:
                    found.append(float(quota) / float(period))
    return found


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
