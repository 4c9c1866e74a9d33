"""TensorRT and TensorRT-RTX, two libraries with one API, imported only when they are needed."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import MissingExtraError
from ...files import replace_file
from ..imports import import_library
from .engine_record import TrtFlavor

_log = logging.getLogger("lsast.tensorrt")

MODULES: dict[TrtFlavor, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module of each library; the extra that installs it has the library's name."""

IGNORED_LOGS = ("catchCudaError", "CUDA initialization failure")
"""Parts of messages that the libraries log with every error on a machine without a driver."""


def load_library(flavor: TrtFlavor) -> Any:
    """The Python module of a library.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed but cannot be imported, e.g. without libraries that it needs.
    """
    try:
        return import_library(MODULES[flavor])
    except ImportError as error:
        raise MissingExtraError(flavor, flavor) from error


@dataclass
class LogCollector:
    """Errors that a library logged, and the memory that an engine needs.

    Many of its calls only log an error and go on, or return None.
    """

    errors: list[str] = field(default_factory=list)
    activation_bytes: int = 0
    """The largest "Total Activation Memory" that a builder logged."""

    def take(self) -> list[str]:
        """Return and clear the errors so far; `IGNORED_LOGS` only if there are no others."""
        important = [line for line in self.errors if not any(ignored in line for ignored in IGNORED_LOGS)]
        errors, self.errors = important or self.errors, []
        return list(dict.fromkeys(errors))


def make_logger(trt: Any) -> tuple[Any, LogCollector]:
    """A logger for the module `trt` that prints nothing, and the collector of what it logs."""
    collector = LogCollector()
    severity = trt.ILogger.Severity

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                collector.errors.append(message.strip())
            elif found := re.search(r"Total Activation Memory: (\d+) bytes", message):
                collector.activation_bytes = max(collector.activation_bytes, int(found[1]))

    return CollectingLogger(), collector


class RuntimeKernelCache:
    """The kernels that TensorRT-RTX compiles for the GPU of this machine, cached in a file beside the engine."""

    def __init__(self, trt: Any, engine: Any, file: Path) -> None:
        self._engine, self._file = engine, file.with_name(f"{file.name}.kernels")
        self._config = engine.create_runtime_config()
        self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # Otherwise kernels for a shape are compiled in the background, and later runs differ from the first.
        self._config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = self._config.create_runtime_cache()
        self._known = self._file.read_bytes() if self._file.is_file() else b""
        if self._known and not self._cache.deserialize(self._known):
            _log.info("%s is of another GPU or version; kernels are compiled again", self._file)
        self._config.set_runtime_cache(self._cache)

    def context(self) -> Any:
        """An execution context that uses the cache."""
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        """Write the file if the cache has changed."""
        kernels = bytes(self._cache.serialize())
        if kernels and kernels != self._known:
            with replace_file(self._file, own=True) as handle:
                handle.write(kernels)
