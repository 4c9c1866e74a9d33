"""The backends: which of them are installed, which devices they find, and the function that opens an engine.

A backend's module, and its library, are imported only when the backend is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..bundle.graph_spec import GraphSpec
from ..errors import BackendError, MissingExtraError, UsageError, install_command
from ..removed import removal
from .base import ComputeDtype, Engine
from .fp32_weights import with_fp32_weights

if TYPE_CHECKING:
    from .tensorrt.engine_record import TrtFlavor

MAX_THREADS = 4096
"""Number of threads that every backend takes."""

_Devices = Callable[[], list[str]]
_Open = Callable[[Path, GraphSpec, str, "int | None", ComputeDtype], Engine]


@dataclass(frozen=True)
class _Backend:
    extra: str
    """The extra that installs it."""
    load: Callable[[], tuple[_Devices, _Open]]
    """Imports its module, and no other: the functions that list its devices and open an engine."""
    fp32_only: bool = False
    gpu_only: bool = False
    expanded_dtypes: tuple[str, ...] = ()
    """16-bit weights that it would hold in memory twice, in 16 and in 32 bits (`fp32_weights`)."""


def _onnxruntime() -> tuple[_Devices, _Open]:
    from . import onnxruntime

    return onnxruntime.devices, onnxruntime.OnnxRuntimeEngine


def _openvino() -> tuple[_Devices, _Open]:
    from . import openvino

    return openvino.devices, openvino.OpenVinoEngine


def _tensorrt(flavor: TrtFlavor) -> tuple[_Devices, _Open]:
    from .tensorrt import engine

    return partial(engine.devices, flavor), partial(engine.TensorRtEngine, flavor=flavor)


_BACKENDS = {
    "onnxruntime": _Backend("cpu", _onnxruntime, fp32_only=True, expanded_dtypes=("F16",)),
    "openvino": _Backend("openvino", _openvino, expanded_dtypes=("F16", "BF16")),
    "tensorrt-rtx": _Backend("tensorrt-rtx", partial(_tensorrt, "tensorrt-rtx"), gpu_only=True),
    "tensorrt": _Backend("tensorrt", partial(_tensorrt, "tensorrt"), gpu_only=True),
}

EXTRAS = {name: backend.extra for name, backend in _BACKENDS.items()}
"""The backends in the order in which ``auto`` tries them, and the extra that installs each."""


def available_backends() -> dict[str, list[str]]:
    """The installed backends that find a device, and their devices, in order of preference."""
    available = {}
    for backend in EXTRAS:
        try:
            devices = backend_devices(backend)
        except (ImportError, BackendError):
            continue
        if devices:
            available[backend] = devices
    return available


def backend_devices(backend: str) -> list[str]:
    """The devices that `backend`, a key of `EXTRAS`, finds; a GPU backend may find none.

    Raises:
        ImportError: it is not installed.
        BackendError: it is installed but cannot be imported.
        KeyError: there is no such backend.
    """
    devices, _ = _BACKENDS[backend].load()
    return devices()


def require_backend(backend: str) -> None:
    """Check that `backend` is installed and finds a device, before a long task starts.

    Args:
        backend: a key of `EXTRAS` in small or capital letters, or ``auto`` for any.

    Raises:
        UsageError: there is no such backend.
        MissingExtraError: it is not available.
    """
    backend = backend.lower()
    if backend not in ("auto", *EXTRAS):
        raise UsageError(f"found no backend {backend!r}; expected auto, {', '.join(EXTRAS)}")
    available = available_backends()
    if not available or (backend != "auto" and backend not in available):
        raise _missing(backend)


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
        path: the ONNX file, with its weights beside it.
        spec: its inputs and outputs, from the manifest.
        backend: ``onnxruntime``, ``openvino``, ``tensorrt-rtx``, ``tensorrt``, or ``auto``: the first that is
            installed, has the device and supports the compute dtype.
        device: ``cpu``, ``cuda``, …, or ``auto``: the GPU for TensorRT, the CPU for the others.
        threads: CPU threads; None is the backend's default.
        compute_dtype: OpenVINO supports what the device does, TensorRT engines what they were compiled in.
        cache: folder for weights converted to float32; None is the user's cache folder (`fp32_weights`).

    Raises:
        UsageError: fewer threads than 1 or more than `MAX_THREADS`, an unknown compute dtype, or a removed option.
        MissingExtraError: no backend is installed.
        BackendError: the backend, device or compute dtype is not available (the message lists what is), or the file
            cannot be loaded or has other inputs and outputs.
    """
    if threads is not None and threads not in range(1, MAX_THREADS + 1):
        raise UsageError(f"found {threads} threads; expected 1 to {MAX_THREADS}")
    for option, value in (("--compute-dtype", compute_dtype), ("--device", device.lower())):
        if gone := removal(f"{option} {value}"):
            raise UsageError(gone)
    if compute_dtype not in get_args(ComputeDtype):
        raise UsageError(f"found compute_dtype {compute_dtype!r}; expected one of {', '.join(get_args(ComputeDtype))}")
    backend, device = _choose(backend.lower(), device.lower(), compute_dtype)
    if not path.is_file():
        raise BackendError(f"found no graph file {path}; export the bundle again")
    _, engine = _BACKENDS[backend].load()
    try:
        if dtypes := _BACKENDS[backend].expanded_dtypes:
            path = with_fp32_weights(path, cache, dtypes)
        return engine(path, spec, device, threads, compute_dtype)
    except (BackendError, MemoryError):
        raise
    except Exception as error:
        raise BackendError(f"{backend} cannot load {path} on {device}: {error}") from error


def _choose(backend: str, device: str, compute_dtype: ComputeDtype) -> tuple[str, str]:
    """An available backend and device; an explicit choice is met or refused."""
    named = _BACKENDS.get(backend)
    usual = "cuda" if named and named.gpu_only else "cpu"
    wanted = usual if device == "auto" else device
    for name, entry in _BACKENDS.items():
        fits = (compute_dtype == "fp32" or not entry.fp32_only) if backend == "auto" else name == backend
        if not fits or (entry.gpu_only and wanted != "cuda"):
            continue
        try:
            if wanted in backend_devices(name):
                return name, wanted
        except ImportError:
            continue
    available = available_backends()
    if not available:
        raise _missing(backend)
    wish = f"device {device!r}" + ("" if compute_dtype == "fp32" else f" and compute_dtype {compute_dtype}")
    listing = "; ".join(f"{name} on {', '.join(devices)}" for name, devices in available.items())
    mend = f"; {_absence(backend)}" if backend in EXTRAS and backend not in available else ""
    raise BackendError(f"found no backend {backend!r} with {wish}; available: {listing}{mend}")


def _missing(backend: str) -> MissingExtraError:
    library = backend if backend in EXTRAS else "onnxruntime"
    return MissingExtraError(library, EXTRAS[library])


def _absence(backend: str) -> str:
    """Why `backend` has no device, and what helps."""
    try:
        backend_devices(backend)
    except BackendError as error:
        return str(error)
    except ImportError:
        return f"install it with: {install_command(EXTRAS[backend])}"
    return f"{backend} is installed but finds no GPU with a driver; lsast-run --doctor reports what is missing"
