"""Graphs on ONNX Runtime: everywhere, CPU and CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .engine import Arithmetic, Array, CheckedEngine, check_interface
from .errors import BackendError
from .spec import DENOISER, GraphSpec

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def devices() -> list[str]:
    """The devices that the installed ONNX Runtime was built for.

    Raises:
        ImportError: it is not installed.
    """
    import onnxruntime

    there = onnxruntime.get_available_providers()
    return [device for device, provider in _PROVIDERS.items() if provider in there]


class OnnxRuntimeEngine(CheckedEngine):
    """A graph in an ONNX Runtime session. See `lsast_engines.engine.Engine`."""

    backend = "onnxruntime"

    def __init__(
        self, path: Path, spec: GraphSpec, device: str, threads: int | None, arithmetic: Arithmetic = "fp32"
    ) -> None:
        import onnxruntime

        super().__init__(spec, device, arithmetic)
        if arithmetic != "fp32":
            raise BackendError(f"onnxruntime computes in fp32, found {arithmetic}; expected fp32, or openvino for it")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        # A pattern is a second arena for a shape that came before: 2.3 GB with Stable Diffusion 1.5 at 512 x 512.
        options.enable_mem_pattern = False
        # The arena keeps what it had for the next run: quicker every step, and 1 GB for nothing once a picture.
        options.enable_cpu_mem_arena = spec.name == DENOISER
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session: Any = onnxruntime.InferenceSession(path, options, providers=[_PROVIDERS[device]])
        # ONNX Runtime runs on the CPU, with a warning, where the provider that was asked for cannot start.
        if (found := self._session.get_providers()[0]) != _PROVIDERS[device]:
            raise BackendError(
                f"found {found} for device {device!r}; expected {_PROVIDERS[device]}, which is installed but does not "
                "start here: check its driver, or use device 'cpu'"
            )
        check_interface(
            spec,
            {
                node.name: (
                    _DTYPES.get(node.type, node.type),
                    tuple(axis if isinstance(axis, int) else None for axis in node.shape),
                )
                for node in self._session.get_inputs()
            },
            {node.name: _DTYPES.get(node.type, node.type) for node in self._session.get_outputs()},
            path,
        )
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._bound_values: dict[str, Any] = {}

    def _bind(self, feeds: dict[str, Array]) -> None:
        self._bound_values |= {name: self._value(value) for name, value in feeds.items()}

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        values = self._bound_values | {name: self._value(value) for name, value in feeds.items()}
        results = self._session.run_with_ort_values(self._outputs, values)
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}

    def _rest(self) -> None:
        """Only a run can shrink an arena; graphs that run once a picture have none."""

    def _release(self) -> None:
        self._session = None
        self._bound_values = {}

    def _value(self, array: Array) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device)
