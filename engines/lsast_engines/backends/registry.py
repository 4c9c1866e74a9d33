"""The backends: which of them are installed, which devices they find, and the function that opens an engine.

A backend's module, and its library, are imported only when the backend is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from ..bundle.graph_spec import GraphSpec
from ..errors import BackendError, MissingExtraError, UsageError
from ..removed import removal
from .base import ComputeDtype, Engine
from .fp32_weights import with_fp32_weights

EXTRAS = {"onnxruntime": "cpu", "openvino": "openvino", "tensorrt-rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
"""The backends in the order in which ``auto`` tries them, and the extra that installs each."""

MAX_THREADS = 4096
"""Number of threads that every backend takes."""

_FP32_ONLY = frozenset({"onnxruntime"})
_GPU_ONLY = frozenset({"tensorrt-rtx", "tensorrt"})

_EXPANDED_DTYPES = {"onnxruntime": ("F16",), "openvino": ("F16", "BF16")}
"""16-bit weights that a backend would hold in memory twice, in 16 and in 32 bits (`fp32_weights`)."""


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
    """
    devices, _ = _backend(backend)
    return devices()


def require_backend(backend: str) -> None:
    """Check that `backend` is installed and finds a device, before a long task starts.

    Args:
        backend: a key of `EXTRAS`, or ``auto`` for any.

    Raises:
        MissingExtraError: it is not available.
    """
    available = available_backends()
    if not available or (backend in EXTRAS and backend not in available):
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
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"found {threads} threads; expected 1 to {MAX_THREADS}")
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
        if dtypes := _EXPANDED_DTYPES.get(backend):
            path = with_fp32_weights(path, cache, dtypes)
        return engine(path, spec, device, threads, compute_dtype)
    except (BackendError, MemoryError):
        raise
    except Exception as error:
        raise BackendError(f"{backend} cannot load {path} on {device}: {error}") from error


def _choose(backend: str, device: str, compute_dtype: ComputeDtype) -> tuple[str, str]:
    """An available backend and device; an explicit choice is met or refused."""
    usual = "cuda" if backend in _GPU_ONLY else "cpu"
    wanted = usual if device == "auto" else device
    able = [name for name in EXTRAS if compute_dtype == "fp32" or name not in _FP32_ONLY]
    for candidate in able if backend == "auto" else [backend]:
        if candidate not in EXTRAS or (candidate in _GPU_ONLY and wanted != "cuda"):
            continue
        try:
            if wanted in backend_devices(candidate):
                return candidate, wanted
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
        return f"install it with: pip install 'lsast[{EXTRAS[backend]}]'"
    return f"{backend} is installed but finds no GPU with a driver; lsast-run --doctor reports what is missing"


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
    from .tensorrt.engine_record import TrtFlavor

    flavor: TrtFlavor = "tensorrt" if name == "tensorrt" else "tensorrt-rtx"
    return (
        functools.partial(tensorrt.devices, flavor),
        functools.partial(tensorrt.TensorRtEngine, flavor=flavor),
    )
