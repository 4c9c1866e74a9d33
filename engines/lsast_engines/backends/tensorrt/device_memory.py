"""A stream of a GPU and the memory that belongs to it: what a compiled engine works with.

Buffers are allocated once and written in place, since addresses are part of a captured CUDA graph. Each wrapper frees
what it took, once, and in the order that CUDA asks for: graphs before the stream that they were captured on, memory
after the last work on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BackendError
from .cuda import checked

Array = npt.NDArray[Any]


class Stream:
    """A stream of its own (graphs cannot be captured on the default one), and the buffers and graphs made for it."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._open: list[Buffer | Graph] = []
        self.handle = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)

    def allocate(self, count: int) -> Buffer:
        """Device memory of `count` bytes; freed with the stream, if not before."""
        buffer = Buffer(self, self._call("cudaMalloc", max(count, 1)), count)
        self._open.append(buffer)
        return buffer

    def write(self, buffer: Buffer, array: Array) -> None:
        """Copy `array` to `buffer`; it may be changed when this returns."""
        array = np.ascontiguousarray(array)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(buffer.holding(array.nbytes), array.ctypes.data, array.nbytes, kind)
        self.wait()

    def read(self, buffer: Buffer, array: Array) -> None:
        """Fill the contiguous `array` from `buffer`, after all work before."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, buffer.holding(array.nbytes), array.nbytes, kind)
        self.wait()

    def wait(self) -> None:
        """Wait for everything on the stream."""
        self._call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts on the stream, without running it; it must allocate nothing and wait for nothing."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            # Ends the capture, whatever it says of it: the stream serves again.
            with contextlib.suppress(BackendError):
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", self.handle))
            raise
        recorded = self._call("cudaStreamEndCapture", self.handle)
        try:
            graph = Graph(self, self._call("cudaGraphInstantiate", recorded, 0))
        finally:
            self._call("cudaGraphDestroy", recorded)
        self._open.append(graph)
        return graph

    def close(self) -> None:
        """Wait, then free graphs, memory and the stream. Closing twice is harmless."""
        if self.handle is None:
            return
        with contextlib.suppress(BackendError):  # after a failed kernel every call fails; memory is freed all the same
            self.wait()
        for thing in sorted(self._open, key=lambda thing: isinstance(thing, Buffer)):
            with contextlib.suppress(BackendError):
                thing.free()
        handle, self.handle = self.handle, None
        with contextlib.suppress(BackendError):
            self._call("cudaStreamDestroy", handle)

    def _copy(self, target: int, source: int, count: int, kind: Any) -> None:
        if count:
            self._call("cudaMemcpyAsync", target, source, count, kind, self.handle)

    def _call(self, name: str, *arguments: Any) -> Any:
        return checked(self._runtime, getattr(self._runtime, name)(*arguments), name)

    def _forget(self, thing: Buffer | Graph) -> None:
        self._open = [other for other in self._open if other is not thing]


class Buffer:
    """Device memory of a stream."""

    def __init__(self, stream: Stream, address: Any, bytes_: int) -> None:
        self._stream = stream
        self.address = int(address)
        self.bytes = bytes_

    def holding(self, count: int) -> int:
        """The address, at which `count` bytes must have room."""
        if count > self.bytes or not self.address:
            raise ValueError(f"found {count} bytes; expected at most {self.bytes}, of memory that is not freed")
        return self.address

    def free(self) -> None:
        """Give the memory back. Freeing twice is harmless."""
        if self.address:
            address, self.address = self.address, 0
            self._stream._forget(self)
            self._stream._call("cudaFree", address)


class Graph:
    """Recorded work of a stream, to be run again and again on the same addresses."""

    def __init__(self, stream: Stream, executable: Any) -> None:
        self._stream = stream
        self._executable = executable

    def launch(self) -> None:
        """Put it on the stream; returns at once."""
        self._stream._call("cudaGraphLaunch", self._executable, self._stream.handle)

    def free(self) -> None:
        """Give it back. Freeing twice is harmless."""
        if self._executable is not None:
            executable, self._executable = self._executable, None
            self._stream._forget(self)
            self._stream._call("cudaGraphExecDestroy", executable)
