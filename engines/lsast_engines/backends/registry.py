"""The backends: which of them are installed, which devices they find, and the function that opens an engine.

A backend's module, and its library, are imported only when the backend is asked for.
"""

import contextlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ..bundle.graph_spec import GraphSpec
from ..environment import core_limit
from ..errors import BackendError, LsastError, MissingExtraError, UsageError, enough_memory, install_command
from ..removed import removal
from .base import ComputeDtype, Engine
from .fp32_weights import with_fp32_weights


@dataclass(frozen=True)
class _Backend:
    extra: str
    """The extra that installs it."""
    module: str
    """Its module, with the functions `devices` and `gpu_fault`."""
    engine: str
    """The subclass of `Engine` in it."""
    flavor: tuple[str, ...] = ()
    """Last argument of these functions and of the class, which tells two backends of one module apart."""
    dtypes: Mapping[str, tuple[ComputeDtype, ...]] = field(default_factory=dict)
    """The compute dtypes by device, where the backend itself does not know them."""
    gpu_only: bool = False
    expanded_dtypes: tuple[str, ...] = ()
    """16-bit weights that it would hold in memory twice, in 16 and in 32 bits (`fp32_weights`)."""

    def call(self, name: str, *arguments: Any) -> Any:
        """Import the backend's module, and no other backend's, and call its function or class `name`."""
        module = importlib.import_module(self.module, __package__)
        return getattr(module, name)(*arguments, *self.flavor)


_BACKENDS = {
    "onnxruntime": _Backend(
        *("cpu", ".onnxruntime", "OnnxRuntimeEngine"),
        dtypes={"cpu": ("fp32",), "cuda": ("fp16", "fp32")},
        expanded_dtypes=("F16",),
    ),
    "openvino": _Backend("openvino", ".openvino", "OpenVinoEngine", expanded_dtypes=("F16", "BF16")),
} | {
    name: _Backend(name, ".tensorrt.engine", "TensorRtEngine", (name,), gpu_only=True)
    for name in ("tensorrt-rtx", "tensorrt")
}

EXTRAS = {name: backend.extra for name, backend in _BACKENDS.items()}
"""The backends in the order in which `find_backend` tries them for ``auto``, and the extra that installs each. The
runtime chooses by `choice.choose`."""


def available_backends() -> dict[str, list[str]]:
    """The installed backends that find a device, and their devices, in order of preference."""
    available = {}
    for backend in EXTRAS:
        with contextlib.suppress(ImportError, BackendError):
            if devices := backend_devices(backend):
                available[backend] = devices
    return available


def backend_devices(backend: str) -> list[str]:
    """The devices that `backend`, a key of `EXTRAS`, finds; a GPU backend may find none.

    Raises:
        ImportError: it is not installed.
        BackendError: it is installed but cannot be imported.
        KeyError: there is no such backend.
    """
    return list(_BACKENDS[backend].call("devices"))


def has_device(backend: str, device: str) -> bool:
    """Whether `backend` finds `device`; looks for a GPU only if that is one. Raises as `backend_devices`."""
    return device in _BACKENDS[backend].call("devices")


def gpu_fault(backend: str) -> str:
    """Why `backend` finds no NVIDIA GPU here, and what helps; empty if it finds one, or never uses one. Raises as
    `backend_devices`."""
    return str(_BACKENDS[backend].call("gpu_fault"))


def open_engine(
    path: Path,
    spec: GraphSpec,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    compute_dtype: ComputeDtype | None = None,
    cache: Path | None = None,
) -> Engine:
    """Load a graph.

    Args:
        path: the ONNX file, with its weights beside it.
        spec: its inputs and outputs, from the manifest.
        backend: a key of `EXTRAS`, or ``auto``: the first that is installed, has the device and supports the compute
            dtype.
        device: ``cpu``, ``cuda``, …, or ``auto``: the GPU for TensorRT, the CPU for the others.
        threads: CPU threads, 1 to 4096; None is the backend's default, and `core_limit` where that is less.
        compute_dtype: None is fp32, and on GPUs fp16. ONNX Runtime computes in fp32, and on GPUs in fp16, too;
            OpenVINO supports what the device does, TensorRT engines what they were compiled in.
        cache: folder for weights converted to float32; None is the user's cache folder (`fp32_weights`).

    Raises:
        UsageError: an unknown compute dtype, or a removed option.
        MissingExtraError: no backend is installed.
        BackendError: the backend, device or compute dtype is not available (the message lists what is), or the file
            cannot be loaded or has other inputs and outputs.
        OutOfMemoryError: there is not enough memory.
    """
    backend, device, compute_dtype = find_backend(backend, device, compute_dtype)
    if not path.is_file():
        raise BackendError(f"found no graph file {path}; export the bundle again")
    entry = _BACKENDS[backend]
    try:
        if device == "cpu":
            path = with_fp32_weights(path, cache, entry.expanded_dtypes)
            threads = threads or core_limit()
        with enough_memory(f"to open {path}", "close other programs, or take a bundle in int8"):
            # The class in its module, e.g. `onnxruntime.OnnxRuntimeEngine`.
            engine: Engine = entry.call(entry.engine, path, spec, device, threads, compute_dtype)
            return engine
    except LsastError:
        raise
    except Exception as error:
        raise BackendError(f"{backend} cannot load {path} on {device}: {error}") from error


def find_backend(backend: str, device: str, compute_dtype: ComputeDtype | None) -> tuple[str, str, ComputeDtype]:
    """The backend, device and compute dtype that `open_engine` uses for these arguments; raises as that does."""
    backend, device = backend.lower(), device.lower()
    for option, value in (("--compute-dtype", compute_dtype), ("--device", device)):
        if gone := removal(f"{option} {value}"):
            raise UsageError(gone)
    if compute_dtype not in (None, *get_args(ComputeDtype)):
        raise UsageError(f"found compute_dtype {compute_dtype!r}; expected one of {', '.join(get_args(ComputeDtype))}")
    named = _BACKENDS.get(backend)
    usual = "cuda" if named and named.gpu_only else "cpu"
    wanted = usual if device == "auto" else device
    unfit = ""
    for name, entry in _BACKENDS.items():
        if backend not in ("auto", name) or (entry.gpu_only and wanted != "cuda"):
            continue
        dtypes = entry.dtypes.get(wanted, (compute_dtype,))
        if compute_dtype is not None and compute_dtype not in dtypes:
            unfit = f"; {name} computes in {' or '.join(map(str, dtypes))} on {wanted}, others may in {compute_dtype}"
            continue
        with contextlib.suppress(ImportError):
            if has_device(name, wanted):
                # Tensor cores of GPUs need fp16.
                return name, wanted, compute_dtype or ("fp16" if wanted == "cuda" else "fp32")
    available = available_backends()
    if not available:
        library = backend if backend in EXTRAS else "onnxruntime"
        raise MissingExtraError(library, EXTRAS[library])
    wish = f"device {device!r}" + ("" if compute_dtype is None else f" and compute_dtype {compute_dtype}")
    listing = "; ".join(f"{name} on {', '.join(devices)}" for name, devices in available.items())
    names = [backend] if backend in EXTRAS else list(EXTRAS) if wanted == "cuda" else []
    mend = "".join(f"; {absence}" for name in names if (absence := _absence(name, wanted)))
    raise BackendError(f"found no backend {backend!r} with {wish}; available: {listing}{unfit or mend}")


def _absence(backend: str, device: str) -> str:
    """Why `backend` does not have `device`, and what helps; empty if that is not known."""
    try:
        backend_devices(backend)  # whether it can be imported
        fault = gpu_fault(backend) if device == "cuda" else ""
    except BackendError as error:
        return str(error)
    except ImportError:
        return f"{backend} is not installed: {install_command(EXTRAS[backend])}"
    return f"{backend}: {fault}" if fault else ""
