"""The CUDA runtime as engines need it, through cuda-bindings: GPUs, a stream, its memory and its graphs.

Buffers are allocated once and written in place, since their addresses are part of a captured CUDA graph. Every wrapper
frees what it allocated once, in the order that CUDA requires: graphs before the stream on which they were captured,
memory after the last work on it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BackendError, MissingExtraError

Array = npt.NDArray[Any]

_REMEDIES = {
    35: "no NVIDIA driver, or one too old for this CUDA: install or update it (nvidia.com/drivers)",
    100: "no NVIDIA GPU: nvidia-smi shows what the driver sees, CUDA_VISIBLE_DEVICES what is hidden",
    803: "driver and CUDA libraries do not fit: update the driver, and restart after it",
    804: "driver and CUDA libraries do not fit: update the driver",
}
"""What mends an error, by its code (docs.nvidia.com/cuda/cuda-runtime-api, cudaError_t)."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    name: str
    capability: str
    """Compute capability, e.g. ``8.9``."""
    memory: int
    """Bytes in all."""


def load_cuda() -> Any:
    """The module `cuda.bindings.runtime`; a `MissingExtraError` if cuda-bindings is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingExtraError("cuda-bindings", "tensorrt-rtx") from error
    return runtime


def gpu_fault() -> str:
    """Why CUDA finds no GPU, with its code, and what mends that; empty if it finds one. Raises as `load_cuda`."""
    runtime = load_cuda()
    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaSuccess:
        return "" if count else "CUDA lists no GPU; nvidia-smi shows what the driver sees"
    remedy = _REMEDIES.get(int(status), "nvidia-smi shows the GPU's state")
    return f"cudaGetDeviceCount: {_text(runtime, status)} ({int(status)}); {remedy}"


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that the driver lists, in its order; none where `gpu_fault` says why. Raises as that does,
    and a `BackendError` where one that the driver lists cannot be asked."""
    runtime = load_cuda()
    if gpu_fault():
        return []
    found = []
    for index in range(runtime.cudaGetDeviceCount()[1]):
        facts = _checked(runtime, runtime.cudaGetDeviceProperties(index), "cudaGetDeviceProperties")
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        found.append(Gpu(name.rstrip("\0"), f"{facts.major}.{facts.minor}", int(facts.totalGlobalMem)))
    return found


def _checked(runtime: Any, answer: tuple[Any, ...], call: str) -> Any:
    """What a call of `cuda.bindings.runtime` returned behind its error code: None, one value, or a tuple."""
    status, *values = answer
    if status != runtime.cudaError_t.cudaSuccess:
        raise BackendError(
            f"{call} failed: {_text(runtime, status)} ({int(status)}); nvidia-smi shows the GPU's state and who uses "
            "its memory"
        )
    return values[0] if len(values) == 1 else tuple(values) or None


def _text(runtime: Any, status: Any) -> str:
    _, text = runtime.cudaGetErrorString(status)
    return text.decode() if isinstance(text, bytes) else str(text)


@dataclass(frozen=True, eq=False)
class Buffer:
    """Device memory of a stream."""

    address: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Graph:
    """Captured work of a stream, which can run again on the same addresses."""

    executable: Any


class Stream:
    """A stream other than the default one, on which graphs cannot be captured, with its buffers and graphs. Every
    method raises a `BackendError` where a call of CUDA fails."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._held: list[Buffer | Graph] = []
        self.handle = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)

    def allocate(self, count: int) -> Buffer:
        """Device memory of `count` bytes, which is freed with the stream."""
        buffer = Buffer(int(self._call("cudaMalloc", max(count, 1))), count)
        self._held.append(buffer)
        return buffer

    def write(self, buffer: Buffer, array: Array) -> None:
        """Copy `array` to `buffer`; the array may be changed after the return."""
        array = np.ascontiguousarray(array)
        self._copy(buffer.address, array.ctypes.data, array.nbytes, buffer, "cudaMemcpyHostToDevice")

    def read(self, buffer: Buffer, array: Array) -> None:
        """Fill the contiguous `array` from `buffer`, after all earlier work."""
        self._copy(array.ctypes.data, buffer.address, array.nbytes, buffer, "cudaMemcpyDeviceToHost")

    def wait(self) -> None:
        """Wait for all work on the stream."""
        self._call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts on the stream, without running it; `work` may not allocate or wait."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            # Ends the capture, whatever its result, so that the stream can be used again.
            with contextlib.suppress(BackendError):
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", self.handle))
            raise
        recorded = self._call("cudaStreamEndCapture", self.handle)
        try:
            graph = Graph(self._call("cudaGraphInstantiate", recorded, 0))
        finally:
            self._call("cudaGraphDestroy", recorded)
        self._held.append(graph)
        return graph

    def launch(self, graph: Graph) -> None:
        """Put the captured work on the stream; returns at once."""
        self._call("cudaGraphLaunch", graph.executable, self.handle)

    def free(self, held: Buffer | Graph) -> None:
        """Free a buffer or a graph, after all earlier work."""
        self.wait()
        self._held.remove(held)
        self._call(*_release(held))

    def close(self) -> None:
        """Wait, then free graphs, memory and the stream. Closing twice is harmless."""
        if self.handle is None:
            return
        held = sorted(self._held, key=lambda each: isinstance(each, Buffer))  # graphs go before memory
        for call in (("cudaStreamSynchronize", self.handle), *map(_release, held), ("cudaStreamDestroy", self.handle)):
            with contextlib.suppress(BackendError):  # after a failed kernel every call fails, but memory is freed
                self._call(*call)
        self.handle, self._held = None, []

    def _copy(self, target: int, source: int, count: int, buffer: Buffer, kind: str) -> None:
        if count > buffer.bytes or buffer not in self._held:
            raise ValueError(f"found {count} bytes; expected at most {buffer.bytes}, of memory that is not freed")
        if count:
            direction = getattr(self._runtime.cudaMemcpyKind, kind)
            self._call("cudaMemcpyAsync", target, source, count, direction, self.handle)
        self.wait()

    def _call(self, name: str, *arguments: Any) -> Any:
        return _checked(self._runtime, getattr(self._runtime, name)(*arguments), name)


def _release(held: Buffer | Graph) -> tuple[str, Any]:
    return ("cudaFree", held.address) if isinstance(held, Buffer) else ("cudaGraphExecDestroy", held.executable)
