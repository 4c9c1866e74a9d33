"""TensorRT and TensorRT-RTX: two libraries of one API, imported only when they are asked for."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.graph_spec import GraphSpec, TensorSpec
from ...errors import BackendError, MissingExtraError, fault_list
from ...files import replace_file
from .engine_record import Library
from .shape_profile import Profile

_log = logging.getLogger("lsast.tensorrt")

MODULES: dict[Library, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module by library; the extra that installs it is named as the library."""

NOISE = ("catchCudaError", "CUDA initialization failure")
"""What the libraries log in passing: where there is no driver, any error is followed by a line with the first."""


def load_library(library: Library) -> Any:
    """The Python module of `library`.

    Raises:
        MissingExtraError: it is not installed, or libraries that it needs are not.
    """
    try:
        return importlib.import_module(MODULES[library])
    except (ImportError, OSError) as error:
        raise MissingExtraError(library, library) from error


@dataclass
class Complaints:
    """What a library logged as wrong. Many of its calls only log and go on, or return None."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def take(self) -> list[str]:
        """The errors so far, which are then forgotten: the telling ones if there are any."""
        telling = [line for line in self.errors if not any(noise in line for noise in NOISE)]
        errors, self.errors = telling or self.errors, []
        return list(dict.fromkeys(errors))


def make_logger(trt: Any) -> tuple[Any, Complaints]:
    """A logger for the module `trt` that prints nothing, and what it gathers."""
    complaints = Complaints()
    severity = trt.ILogger.Severity

    class Gathering(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                complaints.errors.append(message.strip())
            elif level == severity.WARNING:
                complaints.warnings.append(message.strip())

    return Gathering(), complaints


class Kernels:
    """What TensorRT-RTX compiles for the GPU at hand: kept beside the engine, so that it does so once."""

    def __init__(self, trt: Any, engine: Any, file: Path) -> None:
        self._engine, self._file = engine, file.with_name(f"{file.name}.kernels")
        self._config = engine.create_runtime_config()
        self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self._config.create_runtime_cache()
        self._known = self._file.read_bytes() if self._file.is_file() else b""
        if self._known and not self._cache.deserialize(self._known):
            _log.info("%s is of another GPU or version; kernels are compiled anew", self._file)
        self._config.set_runtime_cache(self._cache)

    def context(self) -> Any:
        """An execution context that uses the cache."""
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        """Write the cache if it grew."""
        kernels = bytes(self._cache.serialize())
        if kernels and kernels != self._known:
            with replace_file(self._file) as handle:
                handle.write(kernels)


def check_engine(trt: Any, engine: Any, spec: GraphSpec, profile: Profile, file: Path) -> None:
    """Make sure that the engine has the inputs, outputs and profile that were recorded."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    wanted: dict[str, tuple[TensorSpec, Any]] = {
        **{tensor.name: (tensor, trt.TensorIOMode.INPUT) for tensor in spec.inputs},
        **{tensor.name: (tensor, trt.TensorIOMode.OUTPUT) for tensor in spec.outputs},
    }
    faults = [f"{name}: not in the spec" for name in names if name not in wanted]
    for name, (tensor, mode) in wanted.items():
        if name not in names:
            faults.append(f"{name}: found none; expected {tensor}")
            continue
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        if engine.get_tensor_mode(name) != mode or dtype != np.dtype(tensor.dtype):
            faults.append(f"{name}: found {dtype} {engine.get_tensor_mode(name)}; expected {tensor} {mode}")
        elif name in profile:
            found = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
            if found != tuple(profile[name]):
                faults.append(f"{name}: found profile {found}; expected {tuple(profile[name])}")
    if faults:
        raise BackendError(fault_list(f"{file} is not the engine of graph {spec.name}; compile it again:", faults))
