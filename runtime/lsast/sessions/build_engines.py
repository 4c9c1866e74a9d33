"""Compiling the engines that a GPU backend lacks, if the caller allows it, because it takes minutes.

The exporter compiles in a process of its own, by the command that the error for a missing engine names: the runtime
imports neither the exporter nor what that needs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

from lsast_engines.backends.base import ComputeDtype
from lsast_engines.backends.tensorrt.cuda import gpu_fault, gpus, load_cuda
from lsast_engines.backends.tensorrt.engine import find_engine
from lsast_engines.backends.tensorrt.engine_record import TrtFlavor
from lsast_engines.backends.tensorrt.library import load_library
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS
from lsast_engines.errors import BackendError, MissingExtraError, UsageError

Run = Callable[[list[str]], int]
"""Runs a command, which reports its progress on stderr, and returns its exit status."""


def build_engines(
    bundle: Bundle, backend: str, compute_dtype: ComputeDtype, run: Run | None = None, runtime: Any = None
) -> list[str]:
    """Compile the engines of a bundle that are missing or do not fit this machine, and leave the others.

    Args:
        bundle: the bundle.
        backend: ``tensorrt-rtx`` or ``tensorrt``.
        compute_dtype: what the engines compute in.
        run: runs the compiler; for tests.
        runtime: the module `cuda.bindings.runtime`; for tests.

    Returns:
        The graphs that were compiled.

    Raises:
        UsageError: a backend without compiled engines.
        MissingExtraError: the library, cuda-bindings or a library of the exporter is not installed.
        BackendError: no GPU, or compiling failed; stderr says why.
    """
    if backend not in get_args(TrtFlavor):
        expected = " or ".join(get_args(TrtFlavor))
        raise UsageError(f"found a backend {backend!r} to build engines for; expected {expected}")
    library: TrtFlavor = "tensorrt" if backend == "tensorrt" else "tensorrt-rtx"
    version = str(load_library(library).__version__)
    runtime = runtime or load_cuda()
    if fault := gpu_fault(runtime):
        raise BackendError(f"found no NVIDIA GPU to build engines of {library} for: {fault}")
    found = gpus(runtime)
    missing = []
    # The split graphs are compiled by name only: lsast-export compile --graph unet_full …
    for name in REQUIRED_GRAPHS:
        path, spec = bundle.graph_path(name), bundle.manifest.graphs[name]
        try:
            find_engine(path, spec, library, version, compute_dtype, found[0])
        except BackendError:
            missing.append(name)
    if not missing:
        return []
    if importlib.util.find_spec("lsast_export") is None or importlib.util.find_spec("onnx_ir") is None:
        raise MissingExtraError("the exporter, which compiles engines,", "export")
    command = [sys.executable, "-m", "lsast_export", "compile", str(bundle.path), "--backend", library]
    command += ["--compute-dtype", compute_dtype]
    if library == "tensorrt-rtx":
        command += ["--sm", found[0].capability]
    for name in missing:
        command += ["--graph", name]
    if status := (run or _run)(command):
        raise BackendError(
            f"compiling {', '.join(missing)} failed with exit status {status}; run it by itself: "
            f"lsast-export {' '.join(command[3:])}"
        )
    return missing


def _run(command: list[str]) -> int:
    # What it prints on stdout would mix with the paintings' paths.
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
