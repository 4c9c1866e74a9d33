"""TensorRT and TensorRT-RTX: two libraries of one API, imported only when they are asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from .engine_key import Library
from .errors import MissingExtraError

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
