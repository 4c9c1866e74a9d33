"""Engines that were compiled by TensorRT or TensorRT-RTX, run on an NVIDIA GPU. No torch, no copy that need not be.

Every input and output has one buffer on the device for as long as the engine is open, as large as the profile allows.
What is bound is copied there once. When the same shapes come again, what the library puts on the stream is captured as
a CUDA graph: TensorRT leaves that to its caller, TensorRT-RTX does it by itself when told to.

An engine is only opened if its record agrees with the graph, the library and the GPU: see `engine_key`. Nothing is
compiled here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.graph_spec import GraphSpec
from ...errors import BackendError, fault_list
from ..base import Array, CheckedEngine, ComputeDtype
from .cuda import Gpu, gpus, load_cuda
from .device_memory import Buffer, Graph, Stream
from .engine_record import (
    SUFFIX,
    EngineRecord,
    Library,
    engine_folder,
    graph_digest,
    verified_record,
)
from .library import MODULES, Kernels, check_engine, load_library, make_logger
from .shape_profile import Profile, Shape, output_shapes, require_in_profile

_log = logging.getLogger("lsast.tensorrt")


def devices(library: Library) -> list[str]:
    """``cuda`` where there is an NVIDIA GPU that `library` could use, else none.

    Raises:
        ImportError: the library or cuda-python is not installed.
    """
    for module in (MODULES[library], "cuda"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(module)
    return ["cuda"] if gpus() else []


def find_engine(
    path: Path,
    spec: GraphSpec,
    library: Library,
    version: str,
    compute_dtype: str,
    gpu: Gpu,
) -> EngineRecord:
    """The record of the engine of the graph file `path` that fits this library, arithmetic and GPU.

    It is looked for where `engine_folder` has those of the graph's bundle.

    Raises:
        BackendError: none that fits: what is there instead, field by field, how long it took to compile, and the
            command that compiles it.
    """
    engine = engine_folder(path.parent, library, compute_dtype) / f"{spec.name}{SUFFIX}"
    command = compile_command(path.parent, library, compute_dtype, gpu)
    try:
        record = verified_record(engine)
    except BackendError as error:
        raise BackendError(f"{error}\ncompile with: {command}") from error
    wanted = dataclasses.replace(
        record.key,
        graph=spec.name,
        onnx=graph_digest(path),
        compute_dtype=compute_dtype,
        library=library,
        library_version=version,
    )
    if faults := wanted.differences(record.key) + record.key.serves(gpu.capability, gpu.name):
        heading = f"{engine} was compiled from something else, or for something else:"
        took = f"it took {record.seconds:.0f} s last time"
        raise BackendError(f"{fault_list(heading, faults)}\ncompile again ({took}) with: {command}")
    return record


def compile_command(bundle: Path, library: Library, compute_dtype: str, gpu: Gpu) -> str:
    """What to type where an engine is missing, for this GPU."""
    sm = f" --sm {gpu.capability}" if library == "tensorrt-rtx" else ""
    command = f"lsast-export compile {bundle} --backend {library} --compute-dtype {compute_dtype}{sm}"
    return f"{command}, or let lsast-run do so: --build"


class TensorRtEngine(CheckedEngine):
    """A compiled engine on the first GPU. See `lsast_engines.backends.base.Engine`."""

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        device: str,
        threads: int | None,
        compute_dtype: ComputeDtype = "fp16",
        *,
        library: Library,
        trt: Any = None,
        runtime: Any = None,
    ) -> None:
        """Open the engine of the graph file `path`.

        Args:
            path: the ONNX file of a bundle.
            spec: its inputs and outputs.
            device: ``cuda``.
            threads: of no account: the work is the GPU's.
            compute_dtype: what the engine was compiled in.
            library: the library that compiled it.
            trt: the library's module, to run against another.
            runtime: the module `cuda.bindings.runtime`, likewise.

        Raises:
            MissingExtraError: library or cuda-python is not installed.
            BackendError: no GPU, no engine that fits (`find_engine`), or one that the library refuses.
        """
        super().__init__(spec, device, compute_dtype)
        self.backend: str = library
        trt, runtime = trt or load_library(library), runtime or load_cuda()
        there = gpus(runtime)
        if not there:
            raise BackendError(
                f"found no NVIDIA GPU for {library}; expected one with its driver, see lsast-run --doctor"
            )
        record = find_engine(path, spec, library, str(trt.__version__), compute_dtype, there[0])
        file = engine_folder(path.parent, library, compute_dtype) / f"{spec.name}{SUFFIX}"
        self._profile: Profile = record.key.profile
        self._logger, self._complaints = make_logger(trt)
        self._library: Any = trt.Runtime(self._logger)
        self._engine: Any = self._library.deserialize_cuda_engine(file.read_bytes())
        self._require(self._engine is not None, f"refuses {file}")
        check_engine(trt, self._engine, spec, self._profile, file)
        # TensorRT-RTX compiles kernels for the GPU when a context is made, and captures graphs by itself.
        self._kernels = Kernels(trt, self._engine, file) if library == "tensorrt-rtx" else None
        self._context: Any = self._kernels.context() if self._kernels else self._engine.create_execution_context()
        self._require(self._context is not None, "cannot make an execution context")
        self._stream = Stream(runtime)
        self._buffers: dict[str, Buffer] = {}
        self._shapes: dict[str, Shape] = {}
        self._host: dict[str, Array] = {}
        self._runs = 0
        self._graph: Graph | None = None
        try:
            self._allocate()
        except BaseException:
            self._release()
            raise

    def _bind(self, feeds: dict[str, Array]) -> None:
        require_in_profile(self._profile, {name: value.shape for name, value in feeds.items()}, self.spec.name)
        for name, value in feeds.items():
            self._stream.write(self._buffers[name], value)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        self._bind(feeds)
        self._set_shapes({name: value.shape for name, value in {**self._bound, **feeds}.items()})
        self._enqueue()
        for name, array in self._host.items():
            self._stream.read(self._buffers[name], array)
        return dict(self._host)

    def _rest(self) -> None:
        """Buffers stay: their addresses are part of what was captured."""

    def _release(self) -> None:
        # The library's objects go before the stream and the memory that they were given.
        if self._stream.handle is not None and self._kernels is not None:
            self._kernels.save()
        self._context = self._kernels = self._engine = self._library = None
        self._stream.close()
        self._graph, self._buffers, self._host = None, {}, {}

    def _allocate(self) -> None:
        largest = {name: span.most for name, span in self._profile.items()}
        largest |= output_shapes(self.spec, largest)
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            count = int(np.prod(largest[tensor.name], dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
            buffer = self._buffers[tensor.name] = self._stream.allocate(count)
            done = self._context.set_tensor_address(tensor.name, buffer.address)
            self._require(done, f"does not take the address of {tensor.name}")

    def _set_shapes(self, shapes: dict[str, Shape]) -> None:
        """Tell the context of new shapes; what was captured for others is dropped."""
        if shapes == self._shapes:
            return
        if self._graph is not None:
            self._stream.wait()
            self._graph.free()
            self._graph = None
        self._runs = 0
        self._shapes = {}
        for name, shape in shapes.items():
            self._require(self._context.set_input_shape(name, shape), f"does not take {name} of {list(shape)}")
        missing = self._context.infer_shapes()
        self._require(not missing, f"misses shapes of {', '.join(missing)}")
        outputs = output_shapes(self.spec, shapes)
        for name, shape in outputs.items():
            found = tuple(self._context.get_tensor_shape(name))
            self._require(found == shape, f"gives {name} of {list(found)}, not {list(shape)}")
        dtypes = {tensor.name: tensor.dtype for tensor in self.spec.outputs}
        self._host = {name: np.empty(shape, dtypes[name]) for name, shape in outputs.items()}
        self._shapes = shapes

    def _enqueue(self) -> None:
        """Put one run on the stream: plainly the first time, which settles lazy work, then as a graph."""
        self._runs += 1
        if self._kernels is None and self._runs == 2:
            self._graph = self._stream.capture(self._execute)
        if self._graph is not None:
            self._graph.launch()
        else:
            self._execute()

    def _execute(self) -> None:
        self._require(self._context.execute_async_v3(self._stream.handle), "cannot run")

    def _require(self, passed: Any, what: str) -> None:
        found = self._complaints.take()
        if not passed:
            heading = f"{self.backend}, graph {self.spec.name}: the library {what}:"
            raise BackendError(fault_list(heading, found or ["(it does not say why)"]))
        for line in found:
            _log.error("%s, graph %s: %s", self.backend, self.spec.name, line)
