"""The few calls of the CUDA runtime that engines need, through cuda-python: memory, streams, graphs.

Every call of `cuda.bindings.runtime` returns a tuple that begins with an error code; here that is an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import BackendError, MissingExtraError


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver names it."""

    name: str
    capability: str
    """Compute capability, e.g. ``8.9``."""
    memory: int
    """Bytes in all."""


def load_cuda() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        MissingExtraError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingExtraError("cuda-python", "tensorrt-rtx") from error
    return runtime


def gpus(runtime: Any = None) -> list[Gpu]:
    """The NVIDIA GPUs that the driver offers, in its order; none where there is no driver.

    Raises:
        MissingExtraError: cuda-python is not installed.
    """
    runtime = runtime or load_cuda()
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess:
        return []
    found = []
    for index in range(count):
        facts = checked(runtime, runtime.cudaGetDeviceProperties(index), "cudaGetDeviceProperties")
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        found.append(Gpu(name.rstrip("\0"), f"{facts.major}.{facts.minor}", int(facts.totalGlobalMem)))
    return found


def checked(runtime: Any, answer: tuple[Any, ...], call: str) -> Any:
    """What a call returned beside its error code: nothing, one value, or a tuple.

    Raises:
        BackendError: the code is an error.
    """
    status, *values = answer
    if status != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(status)
        text = text.decode() if isinstance(text, bytes) else str(text)
        raise BackendError(
            f"{call} failed: {text} ({int(status)}); nvidia-smi shows the GPU's state and who uses its memory"
        )
    return values[0] if len(values) == 1 else tuple(values) or None
