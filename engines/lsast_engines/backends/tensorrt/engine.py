"""Engines compiled by TensorRT or TensorRT-RTX, run on an NVIDIA GPU.

Every input and output has one buffer on the device while the engine is open, as large as the profile allows; bound
inputs are copied there once. Working memory is that of the shapes that run, and is given back by `release_memory`.
When the same shapes come again, the work on the stream is captured as a CUDA graph: TensorRT leaves that to its caller,
TensorRT-RTX does it itself.

An engine is opened only if its record agrees with the graph, the library and the GPU (`engine_record`). Nothing is
compiled here.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.graph_spec import GraphSpec
from ...errors import BackendError, Lines, MissingExtraError, fault_list
from ...files import replace_file
from ..base import Array, ComputeDtype, Engine, Shape, import_library, output_shapes
from . import cuda
from .cuda import Buffer, Gpu, Graph, Stream
from .engine_record import (
    RTX_CAPABILITIES,
    SUFFIX,
    EngineRecord,
    Profile,
    TrtFlavor,
    check_profile,
    engine_folder,
    graph_digest,
    verified_record,
)

_log = logging.getLogger("lsast.tensorrt")

MODULES: dict[TrtFlavor, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module of each library; the extra that installs it has the library's name."""

_IGNORED_LOGS = ("catchCudaError", "CUDA initialization failure")
"""Parts of messages that the libraries log with every error on a machine without a driver."""


def load_library(flavor: TrtFlavor) -> Any:
    """The Python module of a library; a `MissingExtraError` if it is not installed, else raises as
    `import_library`."""
    try:
        return import_library(MODULES[flavor])
    except ImportError as error:
        raise MissingExtraError(flavor, flavor) from error


def make_logger(trt: Any) -> Any:
    """A logger for the module `trt` that prints nothing. Many calls of the library only log an error and go on.

    Its `take()` returns and clears the errors so far, those of a missing driver only if there are no others; its
    `activation_bytes` are the largest "Total Activation Memory" that a builder logged.
    """
    severity = trt.ILogger.Severity

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.activation_bytes = 0

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(message.strip())
            elif found := re.search(r"Total Activation Memory: (\d+) bytes", message):
                self.activation_bytes = max(self.activation_bytes, int(found[1]))

        def take(self) -> list[str]:
            important = [line for line in self.errors if not any(ignored in line for ignored in _IGNORED_LOGS)]
            errors, self.errors = important or self.errors, []
            return list(dict.fromkeys(errors))

    return CollectingLogger()


def devices(flavor: TrtFlavor) -> list[str]:
    """``cuda`` if the library can use the first NVIDIA GPU, else none; an ImportError if the library or cuda-bindings
    is not installed."""
    return [] if gpu_fault(flavor) else ["cuda"]


def gpu_fault(flavor: TrtFlavor) -> str:
    """Why the library has no GPU here, and what mends that; empty if it has one. Raises as `devices`."""
    for module in (MODULES[flavor], "cuda.bindings"):
        with contextlib.suppress(ModuleNotFoundError):  # of a package that holds the module
            if importlib.util.find_spec(module) is not None:
                continue
        raise ImportError(module)
    if fault := cuda.gpu_fault():
        return fault
    capability = cuda.gpus()[0].capability
    if flavor == "tensorrt-rtx" and capability not in RTX_CAPABILITIES:
        return (
            f"found compute capability {capability}; expected {', '.join(RTX_CAPABILITIES)}: use --backend onnxruntime "
            "--device cuda, or tensorrt"
        )
    return ""


def find_engine(
    path: Path, spec: GraphSpec, flavor: TrtFlavor, version: str, compute_dtype: str, gpu: Gpu
) -> EngineRecord:
    """The record of the engine of the graph file `path`, in `engine_folder`, for this library, compute dtype and GPU.

    Raises:
        BackendError: no engine, or one for something else: the differences field by field, how long it took to
            compile, and the command that compiles it.
    """
    engine = engine_folder(path.parent, flavor, compute_dtype) / f"{spec.name}{SUFFIX}"
    command = f"lsast-export compile {path.parent} --backend {flavor} --compute-dtype {compute_dtype}"
    command += f" --sm {gpu.capability}" if flavor == "tensorrt-rtx" else ""
    command += ", or let lsast-run do so: --build"
    try:
        record = verified_record(engine)
    except BackendError as error:
        raise BackendError(Lines(f"{error!s}\n  compile with: {command}")) from error
    wanted = dataclasses.replace(
        record.key,
        graph=spec.name,
        onnx=graph_digest(path),
        compute_dtype=compute_dtype,
        library=flavor,
        library_version=version,
    )
    if faults := wanted.differences(record.key) + record.key.unsupported_reasons(gpu.capability, gpu.name):
        heading = f"{engine} was compiled from something else, or for something else:"
        took = f"it took {record.seconds:.0f} s last time"
        raise BackendError(Lines(f"{fault_list(heading, faults)}\n  compile again ({took}) with: {command}"))
    return record


class TensorRtEngine(Engine):
    """The compiled engine of the graph file `path` on the first GPU; `threads` has no effect.

    Raises:
        MissingExtraError: the library or cuda-bindings is not installed.
        BackendError: no GPU, no matching engine (`find_engine`), or one that the library refuses.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        device: str,
        threads: int | None,
        compute_dtype: ComputeDtype,
        flavor: TrtFlavor,
    ) -> None:
        super().__init__(spec, device, compute_dtype)
        self.backend: str = flavor
        trt = load_library(flavor)
        if fault := cuda.gpu_fault():
            raise BackendError(f"found no NVIDIA GPU for {flavor}: {fault}")
        record = find_engine(path, spec, flavor, str(trt.__version__), compute_dtype, cuda.gpus()[0])
        file = engine_folder(path.parent, flavor, compute_dtype) / f"{spec.name}{SUFFIX}"
        self._profile: Profile = record.key.profile
        self._logger = make_logger(trt)
        self._library: Any = trt.Runtime(self._logger)
        self._engine: Any = self._library.deserialize_cuda_engine(file.read_bytes())
        self._require(self._engine is not None, f"refuses {file}")
        # TensorRT-RTX compiles kernels for the GPU when a context is made, and captures graphs itself.
        self._kernels = _RuntimeKernelCache(trt, self._engine, file) if flavor == "tensorrt-rtx" else None
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context: Any = self._kernels.context if self._kernels else self._engine.create_execution_context(strategy)
        self._require(self._context is not None, "cannot make an execution context")
        self._stream = Stream(cuda.load_cuda())
        self._buffers: dict[str, Buffer] = {}
        self._shapes: dict[str, Shape] = {}
        self._host: dict[str, Array] = {}
        self._runs = 0
        self._graph: Graph | None = None
        self._scratch: Buffer | None = None
        try:
            largest = {name: shapes.max for name, shapes in self._profile.items()}
            largest |= output_shapes(spec, largest)
            for tensor in (*spec.inputs, *spec.outputs):
                count = int(np.prod(largest[tensor.name], dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
                buffer = self._buffers[tensor.name] = self._stream.allocate(count)
                done = self._context.set_tensor_address(tensor.name, buffer.address)
                self._require(done, f"refuses the address of {tensor.name}")
        except BaseException:
            self._close()
            raise

    def _bind(self, feeds: dict[str, Array]) -> None:
        check_profile(self._profile, {name: value.shape for name, value in feeds.items()}, self.spec.name)
        for name, value in feeds.items():
            self._stream.write(self._buffers[name], value)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        self._bind(feeds)
        self._set_input_shapes({name: value.shape for name, value in {**self._bound, **feeds}.items()})
        self._enqueue()
        for name, array in self._host.items():
            self._stream.read(self._buffers[name], array)
        return dict(self._host)

    def _release_memory(self) -> None:
        """Free the working memory, with the graph that was captured on it, so that the next engine has it."""
        if self._graph is not None:
            self._stream.free(self._graph)
        if self._scratch is not None:
            self._stream.free(self._scratch)
        self._graph, self._scratch, self._shapes = None, None, {}

    def _close(self) -> None:
        # Work ends before what it uses is freed: the library's objects first, then memory and stream.
        if self._stream.handle is not None:
            with contextlib.suppress(BackendError):  # a failed kernel
                self._stream.wait()
            if self._kernels is not None:
                self._kernels.save()
        self._context = self._kernels = self._engine = self._library = None
        self._stream.close()
        self._graph, self._scratch, self._buffers, self._host = None, None, {}, {}

    def _set_input_shapes(self, shapes: dict[str, Shape]) -> None:
        """Set the input shapes of the context; a graph that was captured for other shapes is dropped."""
        if shapes == self._shapes:
            return
        self._release_memory()
        self._runs = 0
        for name, shape in shapes.items():
            self._require(self._context.set_input_shape(name, shape), f"refuses shape {list(shape)} of {name}")
        missing = self._context.infer_shapes()
        self._require(not missing, f"misses shapes of {', '.join(missing)}")
        outputs = output_shapes(self.spec, shapes)
        for name, shape in outputs.items():
            found = tuple(self._context.get_tensor_shape(name))
            self._require(found == shape, f"gives {name} of shape {list(found)}, not {list(shape)}")
        dtypes = {tensor.name: tensor.dtype for tensor in self.spec.outputs}
        self._host = {name: np.empty(shape, dtypes[name]) for name, shape in outputs.items()}
        # The memory of these shapes, not the largest of the profile.
        self._scratch = self._stream.allocate(int(self._context.update_device_memory_size_for_shapes()))
        self._context.set_device_memory(self._scratch.address, self._scratch.bytes)
        self._shapes = shapes

    def _enqueue(self) -> None:
        """Put one run on the stream: directly the first time, which completes lazy initialisation, then as a graph."""
        self._runs += 1
        if self._kernels is None and self._runs == 2:
            self._graph = self._stream.capture(self._execute)
        if self._graph is not None:
            self._stream.launch(self._graph)
        else:
            self._execute()

    def _execute(self) -> None:
        self._require(self._context.execute_async_v3(self._stream.handle), "cannot run")

    def _require(self, passed: Any, fault: str) -> None:
        errors = self._logger.take()
        if not passed:
            heading = f"{self.backend}, graph {self.spec.name}: the library {fault}:"
            raise BackendError(fault_list(heading, errors or ["(no reason was logged)"]))
        for line in errors:
            _log.error("%s, graph %s: %s", self.backend, self.spec.name, line)


class _RuntimeKernelCache:
    """The kernels that TensorRT-RTX compiles for the GPU of this machine, cached in a file beside the engine."""

    def __init__(self, trt: Any, engine: Any, file: Path) -> None:
        self._file = file.with_name(f"{file.name}.kernels")
        self._config = config = engine.create_runtime_config()  # lives as long as the context
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # Otherwise kernels for a shape are compiled in the background, and later runs differ from the first.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = config.create_runtime_cache()
        self._known = self._file.read_bytes() if self._file.is_file() else b""
        if self._known and not self._cache.deserialize(self._known):
            _log.info("%s is of another GPU or version; kernels are compiled again", self._file)
        config.set_runtime_cache(self._cache)
        self.context = engine.create_execution_context(config)

    def save(self) -> None:
        """Write the file if the cache has changed."""
        kernels = bytes(self._cache.serialize())
        if kernels and kernels != self._known:
            with replace_file(self._file, own=True) as handle:
                handle.write(kernels)
