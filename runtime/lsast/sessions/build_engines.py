"""Compiling the engines that a GPU backend lacks, in a process of the exporter: the runtime imports nothing of that."""

import subprocess
import sys
from collections.abc import Iterable
from typing import cast, get_args

from lsast_engines.backends.base import ComputeDtype
from lsast_engines.backends.tensorrt.cuda import gpu_fault, gpus
from lsast_engines.backends.tensorrt.engine import find_engine, load_library
from lsast_engines.backends.tensorrt.engine_record import TrtFlavor
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.errors import BackendError, UsageError


def build_engines(bundle: Bundle, backend: str, compute_dtype: ComputeDtype, graphs: Iterable[str]) -> list[str]:
    """Compile the engines of `graphs` that are missing or do not fit this machine; → the graphs of these. Raises a
    `UsageError` for a backend without compiled engines, a `MissingExtraError` where a library is missing, a
    `BackendError` without a GPU, or where compiling failed; stderr says why."""
    if backend not in get_args(TrtFlavor):
        expected = " or ".join(get_args(TrtFlavor))
        raise UsageError(f"found a backend {backend!r} to build engines for; expected {expected}")
    library = cast(TrtFlavor, backend)
    version = str(load_library(library).__version__)
    if fault := gpu_fault():
        raise BackendError(f"found no NVIDIA GPU to build engines of {library} for: {fault}")
    gpu, missing = gpus()[0], []
    for name in graphs:
        path, spec = bundle.graph_path(name), bundle.manifest.graphs[name]
        try:
            find_engine(path, spec, library, version, compute_dtype, gpu)
        except BackendError:
            missing.append(name)
    if not missing:
        return []
    command = [sys.executable, "-m", "lsast_export", "compile", str(bundle.path), "--backend", library]
    command += ["--compute-dtype", compute_dtype, *(["--sm", gpu.capability] if library == "tensorrt-rtx" else [])]
    for name in missing:
        command += ["--graph", name]
    if status := _run(command):
        raise BackendError(
            f"compiling {', '.join(missing)} failed with exit status {status}; run it by itself: "
            f"lsast-export {' '.join(command[3:])}"
        )
    return missing


def _run(command: list[str]) -> int:
    """The exit status of a command. What it prints on stdout would mix with the paintings' paths."""
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
