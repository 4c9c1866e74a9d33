"""Running a graph: one protocol, one module per backend, chosen here and nowhere else."""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from ..bundle.graph_spec import GraphSpec, TensorSpec
from ..errors import BackendError, MissingExtraError, UsageError, fault_list
from ..removed import removal
from .fp32_weights import unpacked_graph
from .tensorrt.engine_record import Library

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

ComputeDtype = Literal["fp32", "bf16", "fp16"]
"""What a graph computes in. Below ``fp32`` it is faster where the processor has it, and off by about 1e-2 (bf16) or
1e-3 (fp16); fp16 may overflow."""

EXTRAS = {"onnxruntime": "cpu", "openvino": "openvino", "tensorrt-rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
"""The backends, and the extra that installs each; ``auto`` takes the first that is installed, has the device and may
compute in what is asked for."""

_FP32_ONLY = frozenset({"onnxruntime"})
"""Backends that ``auto`` passes over for any other arithmetic."""


class Engine(Protocol):
    """A graph that is ready to run. It keeps state between calls, so it serves one thread at a time."""

    spec: GraphSpec
    backend: str
    """Name of the backend, a key of `EXTRAS`."""
    device: str
    """Where it runs, e.g. ``cpu``."""
    compute_dtype: ComputeDtype
    """What it computes in."""

    def bind_inputs(self, feeds: Feeds) -> None:
        """Keep inputs for all following calls, checked and copied to the device once; binding again replaces them.

        Raises:
            BackendError: unknown names, wrong types or shapes; all at once.
        """

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """Run once on `feeds` and what is bound.

        Returns:
            The outputs by name. **The next call may overwrite them**: copy what must outlive it.

        Raises:
            BackendError: missing, unknown or already bound names, wrong types or shapes (all at once); a failure while
                running; or a call from a second thread during a call.
        """

    def release_memory(self) -> None:
        """Give working memory back until the next call, where the backend can; weights and what is bound stay.

        The outputs of the last call may go with it.
        """

    def close(self) -> None:
        """Free the memory; the engine cannot be used any more. Closing twice is harmless."""


class CheckedEngine(abc.ABC):
    """What the engines of all backends do alike: check what they are fed, remember what is bound."""

    backend: str

    def __init__(self, spec: GraphSpec, device: str, compute_dtype: ComputeDtype) -> None:
        self.spec = spec
        self.device = device
        self.compute_dtype = compute_dtype
        self._bound: dict[str, Array] = {}
        self._closed = False
        self._busy = threading.Lock()

    def bind_inputs(self, feeds: Feeds) -> None:
        """See `Engine.bind_inputs`."""
        with self._alone():
            self._check(feeds, complete=False)
            # A copy, so that a caller who goes on using the array does not change what is bound.
            copies = {name: np.array(value, order="C") for name, value in feeds.items()}
            self._bind(copies)
            self._bound |= copies

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """See `Engine.__call__`."""
        with self._alone():
            self._check(feeds, complete=True)
            return self._run({name: np.asarray(value, order="C") for name, value in feeds.items()})

    def release_memory(self) -> None:
        """See `Engine.release_memory`."""
        with self._alone():
            self._rest()

    def close(self) -> None:
        """See `Engine.close`."""
        self._closed = True
        self._bound = {}
        self._release()

    @abc.abstractmethod
    def _bind(self, feeds: dict[str, Array]) -> None:
        """Put checked inputs where every run finds them."""

    @abc.abstractmethod
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run on checked inputs and the bound ones."""

    @abc.abstractmethod
    def _rest(self) -> None:
        """Let go of working memory."""

    @abc.abstractmethod
    def _release(self) -> None:
        """Let go of the backend's objects."""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._closed:
            raise BackendError(f"graph {self.spec.name} is closed; open it again with open_engine")
        if not self._busy.acquire(blocking=False):
            raise BackendError(
                f"graph {self.spec.name} is already running in another thread; expected one thread at a time: "
                "guard it with a lock, or open one engine per thread"
            )
        try:
            yield
        except (BackendError, MemoryError):
            raise
        # The backends raise exceptions of no common base.
        except Exception as error:
            raise BackendError(f"graph {self.spec.name} failed in {self.backend} on {self.device}: {error}") from error
        finally:
            self._busy.release()

    def _check(self, feeds: Feeds, *, complete: bool) -> None:
        faults = []
        inputs = {spec.name: spec for spec in self.spec.inputs}
        faults += [f"{name}: unknown; expected {', '.join(inputs)}" for name in feeds if name not in inputs]
        given = {name: value for name, value in feeds.items() if name in inputs}
        if complete:
            faults += [f"{name}: is bound; bind it again to change it" for name in given if name in self._bound]
            given = {**self._bound, **given}
            faults += [f"{name}: missing; expected {spec}" for name, spec in inputs.items() if name not in given]
        lengths: dict[str, tuple[int, str]] = {}
        for name, value in given.items():
            faults += _array_faults(np.asarray(value), inputs[name], lengths)
        if faults:
            raise BackendError(fault_list(f"wrong inputs for graph {self.spec.name}:", faults))


def _array_faults(value: Array, spec: TensorSpec, lengths: dict[str, tuple[int, str]]) -> list[str]:
    """Faults of one input; `lengths` gathers, by dynamic axis, its length and the input that set it."""
    faults = []
    if value.dtype != np.dtype(spec.dtype):
        faults.append(f"{spec.name}: found {value.dtype}; expected {spec.dtype}")
    fixed = [axis if isinstance(axis, int) else length for axis, length in zip(spec.shape, value.shape, strict=False)]
    if value.ndim != len(spec.shape) or list(value.shape) != fixed or 0 in value.shape:
        return [*faults, f"{spec.name}: found shape {list(value.shape)}; expected [{', '.join(map(str, spec.shape))}]"]
    for axis, length in zip(spec.shape, value.shape, strict=True):
        if isinstance(axis, str):
            expected, setter = lengths.setdefault(axis, (length, spec.name))
            if length != expected:
                faults.append(f"{spec.name}: found {axis} = {length}; expected {expected}, as in {setter}")
    return faults


def check_interface(
    spec: GraphSpec,
    inputs: Mapping[str, tuple[str, tuple[int | None, ...]]],
    outputs: Mapping[str, str],
    path: Path,
) -> None:
    """Make sure that a graph file has the inputs and outputs that its spec says.

    Args:
        spec: what the manifest says.
        inputs: type and shape of the file's inputs by name; None is a dynamic axis.
        outputs: type of the file's outputs by name.
        path: the file, for messages.

    Raises:
        BackendError: they differ; all differences at once.
    """
    faults = [f"input {name}: not in the spec" for name in inputs.keys() - {tensor.name for tensor in spec.inputs}]
    for tensor in spec.inputs:
        if tensor.name not in inputs:
            faults.append(f"input {tensor.name}: found none; expected {tensor}")
            continue
        dtype, shape = inputs[tensor.name]
        wanted = tuple(axis if isinstance(axis, int) else None for axis in tensor.shape)
        # A dynamic axis in the file takes the fixed length of the spec; a fixed one takes no other.
        fits = len(shape) == len(wanted) and all(a is None or a == b for a, b in zip(shape, wanted, strict=True))
        if dtype != tensor.dtype or not fits:
            axes = ", ".join("?" if axis is None else str(axis) for axis in shape)
            faults.append(f"input {tensor.name}: found {dtype} [{axes}]; expected {tensor}")
    for tensor in spec.outputs:
        if outputs.get(tensor.name) != tensor.dtype:
            faults.append(f"output {tensor.name}: found {outputs.get(tensor.name, 'none')}; expected {tensor.dtype}")
    if faults:
        raise BackendError(
            fault_list(f"{path} is not the graph {spec.name} that was expected; export it again:", faults)
        )


def available_backends() -> dict[str, list[str]]:
    """The installed backends that find a device here, and their devices, first choice first."""
    there = {}
    for backend in EXTRAS:
        try:
            found = backend_devices(backend)
        except ImportError:
            continue
        if found:
            there[backend] = found
    return there


def backend_devices(backend: str) -> list[str]:
    """The devices that `backend`, a key of `EXTRAS`, finds here; a GPU backend may find none.

    Raises:
        ImportError: it is not installed. A broken installation may raise anything.
    """
    devices, _ = _backend(backend)
    return devices()


def open_engine(
    path: Path,
    spec: GraphSpec,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    compute_dtype: ComputeDtype = "fp32",
    cache: Path | None = None,
) -> Engine:
    """Load a graph.

    Args:
        path: the ONNX file; weights that it refers to lie beside it.
        spec: its inputs and outputs, from the manifest.
        backend: ``onnxruntime``, ``openvino``, ``tensorrt-rtx``, ``tensorrt``, or ``auto``: the first installed that
            has the device and a choice of arithmetic, where another than fp32 is asked for.
        device: ``cpu``, ``cuda``, …, or ``auto``: the CPU, for compiled engines the GPU.
        threads: CPU threads; None leaves it to the backend.
        compute_dtype: what to compute in; OpenVINO has a choice of what the device has, compiled engines have what they
            were compiled in.
        cache: where large weights of 16 bits are unpacked; None is the user's cache folder (`unpacked`).

    Raises:
        UsageError: fewer threads than 1, an unknown arithmetic, or something that was removed.
        MissingExtraError: no backend is installed.
        BackendError: an explicit backend, device or arithmetic that is not there (the message lists what is), or a file
            that cannot be loaded or has other inputs and outputs.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"found {threads} threads; expected at least 1")
    for option, value in (("--compute-dtype", compute_dtype), ("--device", device.lower())):
        if gone := removal(f"{option} {value}"):
            raise UsageError(gone)
    if compute_dtype not in get_args(ComputeDtype):
        raise UsageError(f"found compute_dtype {compute_dtype!r}; expected one of {', '.join(get_args(ComputeDtype))}")
    backend, device = _choose(backend.lower(), device.lower(), compute_dtype)
    if not path.is_file():
        raise BackendError(f"found no graph file {path}; export the bundle again")
    _, engine = _backend(backend)
    try:
        # ONNX Runtime reads bf16 from the file as it goes; fp16, and OpenVINO either, would double in memory.
        kinds = {"onnxruntime": ("F16",), "openvino": ("F16", "BF16")}.get(backend, ())
        return engine(unpacked_graph(path, cache, kinds), spec, device, threads, compute_dtype)
    except (BackendError, MemoryError):
        raise
    except Exception as error:
        raise BackendError(f"{backend} cannot load {path} on {device}: {error}") from error


def _choose(backend: str, device: str, compute_dtype: ComputeDtype) -> tuple[str, str]:
    """Backend and device that are there, for what was asked; an explicit wish is met or refused."""
    # A library of compiled engines that was named has no other device.
    usual = "cuda" if backend in get_args(Library) else "cpu"
    wanted_device = usual if device == "auto" else device
    able = [name for name in EXTRAS if compute_dtype == "fp32" or name not in _FP32_ONLY]
    for candidate in able if backend == "auto" else [backend]:
        if candidate not in EXTRAS:
            break
        devices, _ = _backend(candidate)
        try:
            if wanted_device in devices():
                return candidate, wanted_device
        except ImportError:
            continue
    there = available_backends()
    if not there:
        library = backend if backend in EXTRAS else "onnxruntime"
        raise MissingExtraError(library, EXTRAS[library])
    listing = "; ".join(f"{name} on {', '.join(devices)}" for name, devices in there.items())
    mend = ""
    if backend in EXTRAS and backend not in there:
        mend = f"; {_absence(backend)}"
    wish = f"device {device!r}" + ("" if compute_dtype == "fp32" else f" and compute_dtype {compute_dtype}")
    raise BackendError(f"found no backend {backend!r} with {wish}; there is: {listing}{mend}")


def _absence(backend: str) -> str:
    """Why `backend` has no device here, and what helps."""
    devices, _ = _backend(backend)
    try:
        devices()
    except ImportError:
        return f"install it with: pip install 'lsast[{EXTRAS[backend]}]'"
    return f"{backend} is installed and finds no GPU with a driver; lsast-run --doctor tells what is missing"


_Open = Callable[[Path, GraphSpec, str, "int | None", ComputeDtype], Engine]


def _backend(name: str) -> tuple[Callable[[], list[str]], _Open]:
    """The devices and the engine class of a backend; only its own module is imported."""
    if name == "openvino":
        from . import openvino

        return openvino.devices, openvino.OpenVinoEngine
    if name == "onnxruntime":
        from . import onnxruntime

        return onnxruntime.devices, onnxruntime.OnnxRuntimeEngine
    from .tensorrt import engine as tensorrt

    library: Library = "tensorrt" if name == "tensorrt" else "tensorrt-rtx"
    return (
        functools.partial(tensorrt.devices, library),
        functools.partial(tensorrt.TensorRtEngine, library=library),
    )
