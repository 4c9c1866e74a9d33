"""Graphs on OpenVINO, which reads the same ONNX files and computes in bf16 where the CPU does."""

import contextlib
import ctypes
import functools
import io
import os
import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..bundle.graph_spec import GraphSpec
from ..environment import processor
from ..errors import BackendError
from .base import Array, ComputeDtype, Engine, check_interface, import_library, output_shapes
from .graph_cache import open_cached
from .onnx_file import check_graph

_BLOB = "graph.blob"  # file of an entry in the graph cache

# NaNs that no computation gives, as integers, by their bytes: they mark outputs before a run.
_UNTOUCHED = {2: 0x7E55, 4: 0x7FC05555}

# What failed in a run is never freed: OpenVINO 2026.4.1 leaves a task behind that uses it, and would crash.
_failed: list[Any] = []

_PRECISION_HINTS: dict[ComputeDtype, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def devices() -> list[str]:
    """The devices that OpenVINO finds, e.g. ``cpu``, ``gpu``; an ImportError if it is not installed."""
    return [str(device).lower() for device in shared_core(import_library("openvino")).available_devices]


def gpu_fault() -> str:
    """Empty: OpenVINO uses no NVIDIA GPU."""
    return ""


def compute_dtypes(device: str) -> tuple[ComputeDtype, ...]:
    """What `device` computes in; on a processor with AVX-512, bf16 may be emulated. Raises as `devices`."""
    found = shared_core(import_library("openvino")).get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
    names = {"fp32", *(str(name).lower() for name in found)}
    return tuple(dtype for dtype in _PRECISION_HINTS if dtype in names)


class OpenVinoEngine(Engine):
    """A graph compiled by OpenVINO."""

    backend = "openvino"

    def __init__(
        self, path: Path, spec: GraphSpec, device: str, threads: int | None, compute_dtype: ComputeDtype = "fp32"
    ) -> None:
        openvino = import_library("openvino")
        super().__init__(spec, device, compute_dtype)
        core = shared_core(openvino)
        if compute_dtype not in (supported := compute_dtypes(device)):
            raise BackendError(
                f"openvino cannot compute in {compute_dtype} on {device} here; available: {', '.join(supported)}"
            )
        # By default OpenVINO computes in bf16 where the CPU supports it; results would depend on the machine by 1e-2.
        self._threads = threads if device == "cpu" else None
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[compute_dtype],
            **_threading(self._threads),
        }
        if compute_dtype != "fp32" and device == "cpu":
            # What OpenVINO 2026.4.1 keeps of a first picture of 64 x 64 pixels gives NaN for larger ones in bf16.
            config["CPU_RUNTIME_CACHE_CAPACITY"] = 0
        self._pages = MmapPages(path.parent)
        self._model: Any = None
        _holders.clear()
        self._key = object()
        _open[self._key] = self._threads
        weakref.finalize(self, _open.pop, self._key, None).atexit = False
        _most[self._threads] = max(_most[self._threads], [*_open.values()].count(self._threads))

        def load(entry: Path) -> Any:
            return core.import_model(io.BytesIO((entry / _BLOB).read_bytes()), "CPU", config)

        def build(entry: Path | None) -> Any:
            check_graph(path)
            # Called again where the cache cannot be written: what the first model had mapped is gone with it.
            self._pages = MmapPages(path.parent)
            with self._pages.record():
                self._model = core.read_model(path)  # kept, since it owns the mappings
            with self._pages.advise_dontneed():
                compiled = core.compile_model(self._model, device.upper(), config)
            if entry is not None:
                buffer = io.BytesIO()
                compiled.export_model(buffer)
                (entry / _BLOB).write_bytes(buffer.getbuffer())
            return compiled

        if device == "cpu":
            environment = f"{openvino.__version__} {processor()}"
            self._compiled: Any = open_cached("openvino", path, compute_dtype, environment, load, build)
        else:
            self._compiled = build(None)
        names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        check_interface(
            spec,
            {_name(port, names): (_dtype(port), _axes(port.get_partial_shape())) for port in self._compiled.inputs},
            {_name(port, names): _dtype(port) for port in self._compiled.outputs},
            path,
        )
        with self._pages.advise_dontneed():
            self._request: Any = self._compiled.create_infer_request()
        self._shapes: list[tuple[int, ...]] = []

    def _bind(self, feeds: dict[str, Array]) -> None:
        openvino = import_library("openvino")
        for name, value in feeds.items():
            # Shares the array's memory and keeps it alive.
            self._request.set_tensor(name, openvino.Tensor(value, shared_memory=True))

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        self._bind(feeds)
        shapes = [tuple(self._request.get_tensor(tensor.name).get_shape()) for tensor in self.spec.inputs]
        for mark in self._marks():
            mark[-1:] = _UNTOUCHED[mark.itemsize]
        try:
            # For shapes other than the last ones OpenVINO may pack weights from the file again.
            with contextlib.nullcontext() if shapes == self._shapes else self._pages.advise_dontneed():
                self._request.infer()
            outputs = {tensor.name: self._request.get_tensor(tensor.name).data for tensor in self.spec.outputs}
            self._check_computed(outputs, shapes)
        except Exception:
            _failed.append((self._compiled, self._model))
            raise
        self._shapes = shapes
        return outputs

    def _check_computed(self, outputs: dict[str, Array], shapes: list[tuple[int, ...]]) -> None:
        """Raise MemoryError if OpenVINO computed nothing: without memory, OpenVINO 2026.4.1 with one thread raises no
        error, and leaves the outputs of an earlier run."""
        names = [tensor.name for tensor in self.spec.inputs]
        expected = output_shapes(self.spec, dict(zip(names, shapes, strict=True)))
        if any(outputs[name].shape != shape for name, shape in expected.items()) or any(
            mark[-1] == _UNTOUCHED[mark.itemsize] for mark in self._marks()
        ):
            raise MemoryError("OpenVINO computed nothing")

    def _marks(self) -> list[npt.NDArray[Any]]:
        """The outputs that have a place in memory, as integers of one axis."""
        arrays = [self._request.get_tensor(tensor.name).data.reshape(-1) for tensor in self.spec.outputs]
        return [array.view(f"u{array.itemsize}") for array in arrays if array.size]

    def _release_memory(self) -> None:
        self._compiled.release_memory()

    def _close(self) -> None:
        _open.pop(self._key, None)
        self._request = self._compiled = self._model = None


_open: dict[object, int | None] = {}
"""The numbers of threads of the open engines. A dict is copied in one step, a WeakSet is not."""
_most: Counter[int | None] = Counter()
"""The most engines that were open at once, by their number of threads."""
_holders: list[tuple[int | None, Any]] = []
"""Small models, by their number of threads."""


def _threading(threads: int | None) -> dict[str, Any]:
    """How a model computes; None leaves the number of threads to OpenVINO."""
    return {"PERFORMANCE_HINT": "LATENCY", **({} if threads is None else {"INFERENCE_NUM_THREADS": threads})}


def _before_fork() -> None:
    """Let small models hold the threads of closed engines, which OpenVINO keeps for engines with as many threads: a
    forked process would be given them without the threads, and wait for ever (OpenVINO 2026.4.1)."""
    held = Counter([*_open.values()]) + Counter(threads for threads, _ in _holders)
    for threads in (_most - held).elements():
        openvino = import_library("openvino")
        x = openvino.op.Parameter(openvino.Type.f32, openvino.PartialShape([1]))
        model = shared_core(openvino).compile_model(openvino.Model([x], [x]), "CPU", _threading(threads))
        _holders.append((threads, model))


def _after_fork() -> None:
    for _, model in _holders:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(model))  # never freed: that would wait for the threads
    _holders.clear()
    _open.clear()
    _most.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


@functools.cache
def shared_core(library: Any) -> Any:
    """The process's one OpenVINO core, never destroyed.

    Its CPU plugin gives the thread an alternate signal stack and frees it with the last core; Python's signal handlers
    run on that stack, so that a later Ctrl-C would be a segmentation fault (seen with OpenVINO 2026.4.1).
    """
    return library.Core()


def _name(port: Any, wanted: set[str]) -> str:
    """The name of `port` that the spec has; a port may have several names."""
    names = sorted(port.get_names())
    return next((name for name in names if name in wanted), names[0] if names else "(unnamed)")


def _dtype(port: Any) -> str:
    return str(port.get_element_type().to_dtype())


def _axes(shape: Any) -> tuple[int | None, ...]:
    return tuple(None if axis.is_dynamic else axis.get_length() for axis in shape)


class MmapPages:
    """Memory mappings of the files in one folder, whose resident pages can be given back to the system.

    OpenVINO maps the weight file and repacks the weights, at first use, into memory of its own. The pages of the file
    would stay resident. They are clean: dropping them costs nothing, and a page that is used again is read from the
    file. Works on Linux; elsewhere the system drops pages when it needs memory. The caller keeps the mappings' owner
    alive.
    """

    _recording = threading.Lock()

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder.resolve()}/"
        self._ranges: set[tuple[int, int]] = set()

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the mappings that the block makes. Blocks of several threads wait for each other."""
        with self._recording:
            before = self._mappings()
            yield
            self._ranges |= self._mappings() - before

    @contextlib.contextmanager
    def advise_dontneed(self) -> Iterator[None]:
        """Drop the resident pages of the recorded mappings, several times a second while the block runs, and after."""
        if not self._ranges:
            yield
            return
        done = threading.Event()

        def drop_repeatedly() -> None:
            while not done.wait(0.2):
                self._drop()

        helper = threading.Thread(target=drop_repeatedly, name="lsast-madvise", daemon=True)
        helper.start()
        try:
            yield
        finally:
            done.set()
            helper.join()
            self._drop()

    def _mappings(self) -> set[tuple[int, int]]:
        if not sys.platform.startswith("linux"):
            return set()
        # 7f3e2dc00000-7f3f64c41000 r--s 00000000 fe:00 2457603    /folder/base.safetensors
        line = rf"^(\w+)-(\w+) r--\S (?:\S+ +){{3}}{re.escape(self._folder)}"
        found = re.findall(line, Path("/proc/self/maps").read_text(), re.MULTILINE)
        return {(int(begin, 16), int(end, 16)) for begin, end in found}

    def _drop(self) -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for begin, end in self._ranges:
            madvise(begin, end - begin, 4)  # MADV_DONTNEED
