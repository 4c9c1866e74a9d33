"""Engines that were compiled by TensorRT or TensorRT-RTX, run on an NVIDIA GPU. No torch, no copy that need not be.

Every input and output has one buffer on the device for as long as the engine is open, as large as the profile allows.
What is bound is copied there once; keys and values of styles can lie on the device and be copied row by row
(`resident`). When the same shapes come again, what the library puts on the stream is captured as a CUDA graph: TensorRT
leaves that to its caller, TensorRT-RTX does it by itself when told to.

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

from .cuda import Gpu, gpus, load_cuda
from .device_memory import Buffer, Graph, Stream
from .engine import Arithmetic, Array, CheckedEngine
from .engine_key import SUFFIX, EngineRecord, Library, engine_folder, graph_digest, verified_record
from .errors import BackendError, fault_list
from .files import replace_file
from .profile import Profile, Shape, output_shapes, require_in_profile
from .spec import GraphSpec, TensorSpec
from .tensorrt_library import MODULES, load_library, make_logger

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


def find_engine(path: Path, spec: GraphSpec, library: Library, version: str, arithmetic: str, gpu: Gpu) -> EngineRecord:
    """The record of the engine of the graph file `path` that fits this library, arithmetic and GPU.

    Raises:
        BackendError: none that fits: what is there instead, field by field, how long it took to compile, and the
            command that compiles it.
    """
    engine = engine_folder(path.parent, library, arithmetic) / f"{spec.name}{SUFFIX}"
    sm = f" --sm {gpu.capability}" if library == "tensorrt-rtx" else ""
    command = f"lsast-export compile {path.parent} --backend {library} --arithmetic {arithmetic}{sm}"
    try:
        record = verified_record(engine)
    except BackendError as error:
        raise BackendError(f"{error}\ncompile with: {command}, or let lsast-run do so: --build") from error
    wanted = dataclasses.replace(
        record.key,
        graph=spec.name,
        onnx=graph_digest(path),
        arithmetic=arithmetic,
        library=library,
        library_version=version,
    )
    if faults := wanted.differences(record.key) + record.key.serves(gpu.capability, gpu.name):
        heading = f"{engine} was compiled from something else, or for something else:"
        took = f"it took {record.seconds:.0f} s last time"
        again = f"compile again ({took}) with: {command}, or let lsast-run do so: --build"
        raise BackendError(f"{fault_list(heading, faults)}\n{again}")
    return record


class TensorRtEngine(CheckedEngine):
    """A compiled engine on the first GPU. See `lsast_engines.engine.Engine`."""

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        device: str,
        threads: int | None,
        arithmetic: Arithmetic = "fp16",
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
            arithmetic: what the engine was compiled in.
            library: the library that compiled it.
            trt: the library's module, to run against another.
            runtime: the module `cuda.bindings.runtime`, likewise.

        Raises:
            MissingExtraError: library or cuda-python is not installed.
            BackendError: no GPU, no engine that fits (`find_engine`), or one that the library refuses.
        """
        super().__init__(spec, device, arithmetic)
        self.backend: str = library
        trt, runtime = trt or load_library(library), runtime or load_cuda()
        there = gpus(runtime)
        if not there:
            raise BackendError(
                f"found no NVIDIA GPU for {library}; expected one with its driver, see lsast-run --doctor"
            )
        record = find_engine(path, spec, library, str(trt.__version__), arithmetic, there[0])
        file = engine_folder(path.parent, library, arithmetic) / f"{spec.name}{SUFFIX}"
        self._profile: Profile = record.key.profile
        self._logger, self._complaints = make_logger(trt)
        self._library: Any = trt.Runtime(self._logger)
        self._engine: Any = self._library.deserialize_cuda_engine(file.read_bytes())
        self._require(self._engine is not None, f"refuses {file}")
        _check_engine(trt, self._engine, spec, self._profile, file)
        # TensorRT-RTX compiles kernels for the GPU when a context is made, and captures graphs by itself.
        self._kernels = _Kernels(trt, self._engine, file) if library == "tensorrt-rtx" else None
        self._context: Any = self._kernels.context() if self._kernels else self._engine.create_execution_context()
        self._require(self._context is not None, "cannot make an execution context")
        self._stream = Stream(runtime)
        try:
            self._buffers = self._allocate()
        except BaseException:
            self._release()
            raise
        self._shapes: dict[str, Shape] = {}
        self._host: dict[str, Array] = {}
        self._runs = 0
        self._graph: Graph | None = None

    @property
    def stream(self) -> Stream:
        """The stream that everything of this engine is in order on."""
        return self._stream

    def input_buffer(self, name: str) -> Buffer:
        """The buffer of input `name`, as large as the profile's largest shape."""
        return self._buffers[name]

    def bind_on_device(self, shapes: dict[str, Shape]) -> None:
        """Take for bound what was copied into `input_buffer` on `stream`, in these shapes."""
        with self._alone():
            # Stands for the values in the checks, and takes no room.
            stand_ins = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
            self._check(stand_ins, complete=False)
            require_in_profile(self._profile, shapes, self.spec.name)
            self._bound |= stand_ins

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
        self._graph = None
        if self._stream.handle is not None and self._kernels is not None:
            self._kernels.save()
        self._context = self._kernels = self._engine = self._library = None
        self._stream.close()
        self._host = {}

    def _allocate(self) -> dict[str, Buffer]:
        largest = {name: span.most for name, span in self._profile.items()}
        largest |= output_shapes(self.spec, largest)
        buffers = {}
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            count = int(np.prod(largest[tensor.name], dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
            buffers[tensor.name] = self._stream.allocate(count)
            done = self._context.set_tensor_address(tensor.name, buffers[tensor.name].address)
            self._require(done, f"does not take the address of {tensor.name}")
        return buffers

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


class _Kernels:
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


def _check_engine(trt: Any, engine: Any, spec: GraphSpec, profile: Profile, file: Path) -> None:
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
