"""Engines that were compiled by TensorRT or TensorRT-RTX, run on an NVIDIA GPU. No torch, no copy that need not be.

Every input and output has one buffer on the device for as long as the engine is open, as large as the profile allows.
What is bound is copied there once; keys and values of styles can lie on the device and be copied row by row
(`resident`). When the same shapes come again, what the library puts on the stream is captured as a CUDA graph: TensorRT
leaves that to its caller, TensorRT-RTX does it by itself when told to.

An engine is only opened if its record agrees with the graph, the library and the GPU: see `engine_key`. Nothing is
compiled here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from .cuda import Gpu, gpus, load_cuda
from .device_memory import Buffer, Graph, Stream
from .engine import Arithmetic, Array, CheckedEngine
from .engine_key import (
    EIGHT_BIT,
    SUFFIX,
    EngineRecord,
    Library,
    engine_folder,
    graph_arithmetic,
    graph_digest,
    verified_record,
)
from .errors import BackendError, fault_list
from .profile import Profile, Shape, output_shapes, require_in_profile
from .spec import GraphSpec
from .tensorrt_library import MODULES, Kernels, check_engine, load_library, make_logger

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


class Dependent(Protocol):
    """Something that recorded an engine's work, or that uses its buffers."""

    def reshaped(self) -> None:
        """The engine is about to take other shapes: what was recorded of it is void."""

    def close(self) -> None:
        """The engine is about to close. May be called twice."""


def find_engine(
    path: Path,
    spec: GraphSpec,
    library: Library,
    version: str,
    arithmetic: str,
    gpu: Gpu,
    folder: Path | None = None,
) -> EngineRecord:
    """The record of the engine of the graph file `path` that fits this library, arithmetic and GPU.

    It is looked for in `folder`, by default where `engine_folder` has those of the graph's bundle. In 8 bits is the
    denoiser alone, see `graph_arithmetic`.

    Raises:
        BackendError: none that fits: what is there instead, field by field, how long it took to compile, and the
            command that compiles it.
    """
    engine = (folder or engine_folder(path.parent, library, arithmetic)) / f"{spec.name}{SUFFIX}"
    command = compile_command(path.parent, spec.name, library, arithmetic, gpu)
    try:
        record = verified_record(engine)
    except BackendError as error:
        raise BackendError(f"{error}\ncompile with: {command}") from error
    wanted = dataclasses.replace(
        record.key,
        graph=spec.name,
        onnx=graph_digest(path),
        arithmetic=graph_arithmetic(spec.name, arithmetic),
        library=library,
        library_version=version,
    )
    if faults := wanted.differences(record.key) + record.key.serves(gpu.capability, gpu.name):
        heading = f"{engine} was compiled from something else, or for something else:"
        took = f"it took {record.seconds:.0f} s last time"
        raise BackendError(f"{fault_list(heading, faults)}\ncompile again ({took}) with: {command}")
    return record


def compile_command(bundle: Path, graph: str, library: Library, arithmetic: str, gpu: Gpu) -> str:
    """What to type where the engine of `graph` is missing, for this GPU."""
    sm = f" --sm {gpu.capability}" if library == "tensorrt-rtx" else ""
    if graph_arithmetic(graph, arithmetic) in EIGHT_BIT:
        options = f"--to {arithmetic} --images PHOTOGRAPHS --backend {library}{sm}"
        return f"lsast-export modelopt QUANTISED {bundle} {options} (needs NVIDIA's ModelOpt, see docs/gpu.md)"
    part = f" --graph {graph}" if arithmetic in EIGHT_BIT else ""
    command = f"lsast-export compile {bundle} --backend {library} --arithmetic {arithmetic}{sm}{part}"
    return f"{command}, or let lsast-run do so: --build"


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
        folder: Path | None = None,
        stream: Stream | None = None,
        shared: Mapping[str, Buffer] | None = None,
    ) -> None:
        """Open the engine of the graph file `path`.

        Args:
            path: the ONNX file of a bundle.
            spec: its inputs and outputs.
            device: ``cuda``.
            threads: of no account: the work is the GPU's.
            arithmetic: what the engine was compiled in; 8 bits mean the denoiser, and fp16 for the others.
            library: the library that compiled it.
            trt: the library's module, to run against another.
            runtime: the module `cuda.bindings.runtime`, likewise.
            folder: where the engine lies, if not where that of a bundle does.
            stream: another engine's, to work in order with it; it must be closed after this one.
            shared: that engine's buffers to use for inputs of these names.

        Raises:
            MissingExtraError: library or cuda-python is not installed.
            BackendError: no GPU, no engine that fits (`find_engine`), or one that the library refuses.
        """
        super().__init__(spec, device, cast(Arithmetic, graph_arithmetic(spec.name, arithmetic)))
        self.backend: str = library
        trt, runtime = trt or load_library(library), runtime or load_cuda()
        there = gpus(runtime)
        if not there:
            raise BackendError(
                f"found no NVIDIA GPU for {library}; expected one with its driver, see lsast-run --doctor"
            )
        self._folder = folder or engine_folder(path.parent, library, arithmetic)
        record = find_engine(path, spec, library, str(trt.__version__), arithmetic, there[0], self._folder)
        file = self._folder / f"{spec.name}{SUFFIX}"
        self._modules = library, trt, runtime
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
        self._stream, self._owns_stream = stream or Stream(runtime), stream is None
        self._buffers: dict[str, Buffer] = {}
        self._shared = dict(shared or {})
        self.dependents: list[Dependent] = []
        self._shapes: dict[str, Shape] = {}
        self._host: dict[str, Array] = {}
        self._runs = 0
        self._graph: Graph | None = None
        try:
            self._allocate()
        except BaseException:
            self._release()
            raise

    @property
    def stream(self) -> Stream:
        """The stream that everything of this engine is in order on."""
        return self._stream

    def buffer(self, name: str) -> Buffer:
        """The buffer of input or output `name`, as large as the profile's largest shape."""
        return self._buffers[name]

    def beside(
        self, path: Path, spec: GraphSpec, arithmetic: Arithmetic, shared: Mapping[str, Buffer]
    ) -> TensorRtEngine:
        """Open the engine of another graph that lies beside this one, to work on the same stream.

        It takes the buffers `shared` of this engine for its inputs of these names, and is closed before this one.

        Raises:
            BackendError: see the constructor.
        """
        library, trt, runtime = self._modules
        return TensorRtEngine(
            path,
            spec,
            self.device,
            None,
            arithmetic,
            library=library,
            trt=trt,
            runtime=runtime,
            folder=self._folder,
            stream=self._stream,
            shared=shared,
        )

    def lay(self, shapes: dict[str, Shape]) -> None:
        """Get ready for `execute`: what is bound, and the other inputs in these shapes, which lie in their buffers.

        Raises:
            BackendError: wrong or missing inputs, or shapes that it was not compiled for.
        """
        with self._alone():
            self._check(_stand_ins(shapes, self.spec), complete=True)
            require_in_profile(self._profile, shapes, self.spec.name)
            self._set_shapes({name: value.shape for name, value in self._bound.items()} | shapes)

    def execute(self) -> None:
        """Put one run in the shapes of `lay` on the stream; returns at once. A graph may record it."""
        self._execute()

    @property
    def records_itself(self) -> bool:
        """Whether the library captures its work as a CUDA graph, so that its caller must not."""
        return self._kernels is not None

    def bind_on_device(self, shapes: dict[str, Shape]) -> None:
        """Take for bound what was copied into `input_buffer` on `stream`, in these shapes."""
        with self._alone():
            stand_ins = _stand_ins(shapes, self.spec)
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
        for dependent in self.dependents:
            dependent.close()
        # The library's objects go before the stream and the memory that they were given.
        if self._stream.handle is not None and self._kernels is not None:
            self._kernels.save()
        self._context = self._kernels = self._engine = self._library = None
        if self._owns_stream:
            self._stream.close()
        elif self._stream.handle is not None:
            with contextlib.suppress(BackendError):  # after a failed kernel every call fails
                self._stream.wait()
            own: list[Buffer | Graph] = [self._graph] if self._graph else []
            own += [buffer for name, buffer in self._buffers.items() if name not in self._shared]
            for thing in own:
                with contextlib.suppress(BackendError):
                    thing.free()
        self._graph, self._buffers, self._host = None, {}, {}

    def _allocate(self) -> None:
        largest = {name: span.most for name, span in self._profile.items()}
        largest |= output_shapes(self.spec, largest)
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            count = int(np.prod(largest[tensor.name], dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
            if (buffer := self._shared.get(tensor.name)) is None:
                buffer = self._stream.allocate(count)
            elif buffer.bytes < count:
                raise BackendError(
                    f"graph {self.spec.name} was compiled for larger sizes than the graph that gives {tensor.name} "
                    f"({count} against {buffer.bytes} bytes); compile both with the same --sides and --batch"
                )
            self._buffers[tensor.name] = buffer
            done = self._context.set_tensor_address(tensor.name, buffer.address)
            self._require(done, f"does not take the address of {tensor.name}")

    def _set_shapes(self, shapes: dict[str, Shape]) -> None:
        """Tell the context of new shapes; what was captured for others is dropped."""
        if shapes == self._shapes:
            return
        for dependent in self.dependents:
            dependent.reshaped()
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


def _stand_ins(shapes: Mapping[str, Shape], spec: GraphSpec) -> dict[str, Array]:
    """Arrays that stand for values on the device in the checks, and take no room."""
    dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in spec.inputs}
    return {name: np.broadcast_to(np.zeros((), dtypes.get(name)), shape) for name, shape in shapes.items()}
