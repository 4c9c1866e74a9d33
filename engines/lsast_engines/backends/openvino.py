"""Graphs on OpenVINO: reads the same ONNX files, fastest on x86 CPUs."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

from ..bundle.graph_spec import GraphSpec
from ..errors import BackendError
from .base import Array, CheckedEngine, ComputeDtype, check_interface
from .mapped import MappedFiles
from .openvino_cache import compiled

_HINTS: dict[ComputeDtype, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def devices() -> list[str]:
    """The devices that OpenVINO finds here, e.g. ``cpu``, ``gpu``.

    Raises:
        ImportError: it is not installed.
    """
    import openvino

    return [str(device).lower() for device in shared_core(openvino).available_devices]


class OpenVinoEngine(CheckedEngine):
    """A graph compiled by OpenVINO, in this process. See `lsast_engines.backends.base.Engine`."""

    backend = "openvino"

    def __init__(
        self, path: Path, spec: GraphSpec, device: str, threads: int | None, compute_dtype: ComputeDtype = "fp32"
    ) -> None:
        import openvino

        super().__init__(spec, device, compute_dtype)
        core = shared_core(openvino)
        _require(core, device, compute_dtype)
        # OpenVINO would take bf16 by itself where the CPU has it; then results depend on the machine by 1e-2.
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[compute_dtype], "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None and device == "cpu":
            config["INFERENCE_NUM_THREADS"] = threads
        self._mapped = MappedFiles(path.parent)
        self._model: Any = None

        def compile_graph() -> Any:
            with self._mapped.watch():
                self._model = core.read_model(path)  # kept, for it keeps the mappings
            with self._mapped.released():
                return core.compile_model(self._model, device.upper(), config)

        if device == "cpu":
            self._compiled: Any = compiled(core, path, compute_dtype, config, openvino.__version__, compile_graph)
        else:
            self._compiled = compile_graph()
        inputs = {_name(port, [tensor.name for tensor in spec.inputs]): port for port in self._compiled.inputs}
        outputs = {_name(port, [tensor.name for tensor in spec.outputs]): port for port in self._compiled.outputs}
        check_interface(
            spec,
            {name: (_dtype(port), _axes(port.get_partial_shape())) for name, port in inputs.items()},
            {name: _dtype(port) for name, port in outputs.items()},
            path,
        )
        with self._mapped.released():
            self._request: Any = self._compiled.create_infer_request()
        self._shapes: list[tuple[int, ...]] = []
        self._outputs = [tensor.name for tensor in spec.outputs]

    def _bind(self, feeds: dict[str, Array]) -> None:
        import openvino

        for name, value in feeds.items():
            # Shares the array's memory and keeps it alive.
            self._request.set_tensor(name, openvino.Tensor(value, shared_memory=True))

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        self._bind(feeds)
        shapes = [tuple(self._request.get_tensor(tensor.name).get_shape()) for tensor in self.spec.inputs]
        # For shapes that it did not meet just before, weights may be packed from the file once more.
        with contextlib.nullcontext() if shapes == self._shapes else self._mapped.released():
            self._request.infer()
        self._shapes = shapes
        return {name: self._request.get_tensor(name).data for name in self._outputs}

    def _rest(self) -> None:
        self._compiled.release_memory()

    def _release(self) -> None:
        self._request = self._compiled = self._model = None


@functools.cache
def shared_core(library: Any) -> Any:
    """The process's one OpenVINO core, never destroyed.

    Its CPU plugin gives the thread an alternate signal stack and frees it with the last core; Python's handlers run on
    that stack, so that a later Ctrl-C would be a segmentation fault (seen with OpenVINO 2026.4.1).
    """
    return library.Core()


def _require(core: Any, device: str, compute_dtype: ComputeDtype) -> None:
    """Refuse an arithmetic that the device would only imitate, or ignore."""
    there = {str(name).lower() for name in core.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")}
    if compute_dtype != "fp32" and compute_dtype not in there:
        has = ", ".join(name for name in ("fp32", "bf16", "fp16") if name in there)
        raise BackendError(f"openvino cannot compute in {compute_dtype} on {device} here; there is: {has}")


def _name(port: Any, wanted: list[str]) -> str:
    """The name of `port` that the spec knows; a port may have several."""
    names = sorted(port.get_names())
    return next((name for name in names if name in wanted), names[0] if names else "(unnamed)")


def _dtype(port: Any) -> str:
    return str(port.get_element_type().to_dtype())


def _axes(shape: Any) -> tuple[int | None, ...]:
    return tuple(None if axis.is_dynamic else axis.get_length() for axis in shape)
