# ruff: noqa: N802, N815 - the fakes have the names of what they stand for
"""TensorRT, TensorRT-RTX and the CUDA runtime as explicit fakes, for tests where no GPU is.

The fakes keep device memory as bytes at addresses, run "kernels" on those bytes in the order of the stream, and refuse
what the real ones would: memory that was freed, calls that may not be made while capturing, objects used after what
they depend on is gone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from graph_runs import run_graph
from lsast_engines.backends.base import output_shapes
from lsast_engines.backends.tensorrt.engine_record import (
    ANY_GPU,
    EngineKey,
    EngineRecord,
    ShapeRanges,
    TrtFlavor,
    graph_digest,
)
from lsast_engines.bundle.graph_spec import GraphSpec

VERSION = "1.7.1"
SCRATCH = 512
"""Bytes of working memory of every context."""


@dataclass(frozen=True)
class Kernel:
    """What a fake engine computes: what ONNX Runtime makes of a graph file."""

    spec: GraphSpec
    path: Path


def write_engine(
    file: Path,
    spec: GraphSpec,
    folder: Path,
    library: TrtFlavor = "tensorrt",
    ranges: ShapeRanges | None = None,
    compute_dtype: str = "fp16",
    content: bytes = b"",
    **changes: Any,
) -> Path:
    """What compiling the graph file `file` would have left in `folder`; `changes` are fields of the key."""
    content = content or json.dumps({"graph": spec.name}).encode()
    key = EngineKey(
        graph=spec.name,
        onnx=graph_digest(file),
        profile=(ranges or ShapeRanges()).profile(spec),
        compute_dtype=compute_dtype,
        library=library,
        library_version=VERSION,
        targets=("8.9",),
        gpu="Fake GPU" if library == "tensorrt" else ANY_GPU,
    )
    folder.mkdir(parents=True, exist_ok=True)
    engine = folder / f"{spec.name}.engine"
    engine.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    key = dataclasses.replace(key, **changes)
    record = EngineRecord(
        key=key, sha256=digest, bytes=len(content), seconds=41.6, activation_bytes=SCRATCH, lsast_version="0"
    )
    record.save(engine)
    return engine


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900


class FakeCuda:
    """`cuda.bindings.runtime`: every call returns (status, values…)."""

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(
        self, capability: tuple[int, int] = (8, 9), count: int = 1, driver: Status = Status.cudaSuccess
    ) -> None:
        self.capability, self.count, self.driver = capability, count, driver
        self.memory: dict[int, bytearray] = {}
        self.calls: list[str] = []
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.recorded: dict[int, set[int]] = {}
        """By executable graph, the contexts whose work is in it."""
        self._recording: set[int] = set()
        self.streams: set[int] = set()
        self.room = 1 << 30
        self.objects: list[str] = []
        self._next = 0x1000

    def _handle(self) -> int:
        self._next += 0x1000000
        return self._next

    def view(self, address: int, count: int) -> memoryview:
        for start, block in self.memory.items():
            if start <= address and address + count <= start + len(block):
                return memoryview(block)[address - start : address - start + count]
        raise AssertionError(f"{count} bytes at {address:#x} are no memory of the device")

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        assert stream in self.streams, "work on a stream that is closed"
        if self.captured is not None:
            self.captured.append(work)
        else:
            work()

    def _may_not_capture(self, name: str) -> Status:
        self.calls.append(name)
        return Status.cudaSuccess if self.captured is None else Status.cudaErrorStreamCaptureUnsupported

    def cudaGetDeviceCount(self) -> tuple[Status, int | None]:
        return self.driver, None if self.driver else self.count

    def cudaGetDeviceProperties(self, index: int) -> tuple[Status, Any]:
        major, minor = self.capability
        return Status.cudaSuccess, SimpleNamespace(name=b"Fake GPU\0", major=major, minor=minor, totalGlobalMem=1 << 30)

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return Status.cudaSuccess, status.name.encode()

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        assert flags == self.cudaStreamNonBlocking
        handle = self._handle()
        self.streams.add(handle)
        return self._may_not_capture("create"), handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        if self.streams == {stream}:  # of several engines nobody knows what is whose
            assert not self.memory, "the stream goes last"
            assert not self.executables, "graphs go before their stream"
            assert not self.objects, "the library's objects go before the stream they used"
        self.streams.remove(stream)
        return (self._may_not_capture("destroy"),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        assert stream in self.streams
        return (self._may_not_capture("wait"),)

    def cudaMalloc(self, count: int) -> tuple[Status, int | None]:
        status = self._may_not_capture("malloc")
        if sum(map(len, self.memory.values())) + count > self.room:
            return Status.cudaErrorMemoryAllocation, None
        address = self._handle()
        self.memory[address] = bytearray(b"\xa5" * count)  # never zeros by chance
        return status, address

    def cudaFree(self, address: int) -> tuple[Status]:
        assert address in self.memory, "freed twice, or never allocated"
        del self.memory[address]
        return (self._may_not_capture("free"),)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> tuple[Status]:
        self.calls.append({1: "upload", 2: "download"}[kind])

        def work() -> None:
            if kind == 1:
                self.view(target, count)[:] = ctypes.string_at(source, count)
            else:
                ctypes.memmove(target, bytes(self.view(source, count)), count)

        self.submit(stream, work)
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Status]:
        assert mode == 1
        assert self.captured is None
        self.captured, self._recording = [], set()
        self.calls.append("begin capture")
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, int]:
        assert self.captured is not None
        handle = self._handle()
        self.graphs[handle], self.captured = self.captured, None
        self.calls.append("end capture")
        return Status.cudaSuccess, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, int]:
        handle = self._handle()
        self.executables[handle] = list(self.graphs[graph])
        self.recorded[handle] = set(self._recording)
        return self._may_not_capture("instantiate"), handle

    def cudaGraphDestroy(self, graph: int) -> tuple[Status]:
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Status]:
        del self.executables[executable], self.recorded[executable]
        return (self._may_not_capture("free graph"),)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Status]:
        self.calls.append("launch")
        for work in self.executables[executable]:
            self.submit(stream, work)
        return (Status.cudaSuccess,)


class FakeTrt:
    """`tensorrt` or `tensorrt_rtx`, as far as running goes; engines are JSON of a graph's name."""

    __version__ = VERSION
    CudaGraphStrategy = IntEnum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
    DynamicShapesKernelSpecializationStrategy = IntEnum("Specialization", ["LAZY", "EAGER", "NONE"])
    ExecutionContextAllocationStrategy = IntEnum("Allocation", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
    ILogger = type("ILogger", (), {"Severity": IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO"])})

    def __init__(self, cuda: FakeCuda, kernels: dict[str, Kernel]) -> None:
        self.cuda = cuda
        self.graphs = kernels
        self.failing = False
        self.configs: list[Any] = []
        self.kernels = b"compiled for this GPU"

    def Runtime(self, logger: Any) -> Any:
        return _Object(self.cuda, "runtime", deserialize_cuda_engine=functools.partial(self._deserialize, logger))

    def _deserialize(self, logger: Any, data: bytes) -> Any:
        if not data.startswith(b"{"):
            logger.log(self.ILogger.Severity.ERROR, "Serialization assertion magicTag failed")
            return None
        return FakeEngine(self, logger, self.graphs[json.loads(data)["graph"]])


class _Object:
    """Something of the library that must be gone before the stream is."""

    def __init__(self, cuda: FakeCuda, name: str, **members: Any) -> None:
        cuda.objects.append(name)
        self._cuda, self._name = cuda, name
        self.__dict__.update(members)

    def __del__(self) -> None:
        self._cuda.objects.remove(self._name)


class FakeEngine(_Object):
    def __init__(self, trt: FakeTrt, logger: Any, kernel: Kernel) -> None:
        super().__init__(trt.cuda, "engine")
        self.logger, self.trt, self.kernel = logger, trt, kernel

    def create_execution_context(self, given: Any) -> FakeContext:
        strategy = given if isinstance(given, IntEnum) else given.strategy
        assert strategy.name == "USER_MANAGED", "memory for the largest shapes of the profile"
        return FakeContext(self)

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(known=b"")
        cache.deserialize = lambda blob: bool(setattr(cache, "known", blob)) or True
        trt = self.trt
        cache.serialize = lambda: trt.kernels
        config = SimpleNamespace(create_runtime_cache=lambda: cache, cache=None)
        config.set_runtime_cache = lambda given: setattr(config, "cache", given)
        config.set_execution_context_allocation_strategy = lambda given: setattr(config, "strategy", given)
        self.trt.configs.append(config)
        return config


class FakeContext(_Object):
    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(engine.trt.cuda, "context")
        self.engine, self.trt, self.cuda = engine, engine.trt, engine.trt.cuda
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scratch = 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.cuda.memory
        self.addresses[name] = address
        self.cuda.calls.append("address")
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not any(id(self) in contexts for contexts in self.cuda.recorded.values()), "shapes are part of a graph"
        assert isinstance(shape, tuple)
        self.shapes[name] = shape
        self.cuda.calls.append("shape")
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes()
        return SCRATCH

    def set_device_memory(self, address: int, size: int) -> None:
        assert len(self.cuda.memory[address]) >= size >= SCRATCH
        self.scratch = address

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in self.engine.kernel.spec.inputs if tensor.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(output_shapes(self.engine.kernel.spec, self.shapes)[name])

    def execute_async_v3(self, stream: int) -> bool:
        self.cuda.calls.append("execute")
        if self.trt.failing:
            self.engine.logger.log(self.trt.ILogger.Severity.ERROR, "Cuda Runtime (an illegal memory access)")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)  # a graph keeps those of its capture
        kernel, cuda = self.engine.kernel, self.cuda
        if cuda.captured is not None:
            cuda._recording.add(id(self))

        scratch = self.scratch

        def work() -> None:
            cuda.view(scratch, SCRATCH)[:] = b"\0" * SCRATCH
            feeds = {}
            for tensor in kernel.spec.inputs:
                count = int(np.prod(shapes[tensor.name], dtype=int)) * np.dtype(tensor.dtype).itemsize
                data = bytes(cuda.view(addresses[tensor.name], count))
                feeds[tensor.name] = np.frombuffer(data, tensor.dtype).reshape(shapes[tensor.name])
            for name, value in run_graph(kernel.path, feeds).items():
                cuda.view(addresses[name], value.nbytes)[:] = value.tobytes()

        cuda.submit(stream, work)
        return True
