"""Graphs on ONNX Runtime: everywhere, on the CPU and, by its CUDA provider, on NVIDIA GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..bundle.graph_spec import DENOISER, UNET_SPLIT_GRAPHS, GraphSpec
from ..errors import BackendError
from .base import Array, CheckedEngine, ComputeDtype, check_interface
from .onnxruntime_cache import optimised

EXPANDED_LIMIT = 1_000_000_000
"""Bytes of weights stored in bf16 up to which they are expanded to float32 once, when the graph is opened.

Beyond, ONNX Runtime leaves them in the file, mapped, and expands each one whenever it is used; it cannot be kept from
expanding fp16 (8.5 GB), so that large fp16 weights come here unpacked (`lsast_engines.backends.fp32_weights`). With
Stable Diffusion
1.5 in bf16 at 512 x 512 the denoiser opens in 1.6 s instead of 40 and peaks at 3.0 GB instead of 8.4; a step takes a
sixth longer (50.4 s against 42.9 on one busy core)."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's name of the provider, by device."""

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def devices() -> list[str]:
    """The devices that the installed ONNX Runtime was built for.

    Raises:
        ImportError: it is not installed.
    """
    import onnxruntime

    there = onnxruntime.get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in there]


def half_bytes(folder: Path, *dtypes: str) -> int:
    """Bytes of tensors of `dtypes` (safetensors' names) in the files of `folder`; an unreadable one counts nothing."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="numpy") as weights:
                for name in weights.keys():  # noqa: SIM118 - it is no dict
                    tensor = weights.get_slice(name)
                    if tensor.get_dtype() in dtypes:
                        count += 2 * math.prod(tensor.get_shape())
        except (OSError, SafetensorError):
            continue
    return count


class OnnxRuntimeEngine(CheckedEngine):
    """A graph in an ONNX Runtime session. See `lsast_engines.backends.base.Engine`."""

    backend = "onnxruntime"

    def __init__(
        self, path: Path, spec: GraphSpec, device: str, threads: int | None, compute_dtype: ComputeDtype = "fp32"
    ) -> None:
        import onnxruntime

        super().__init__(spec, device, compute_dtype)
        if compute_dtype != "fp32":
            raise BackendError(f"onnxruntime computes in fp32, found {compute_dtype}; use openvino for it")
        left_out = ["ConstantFolding"] if device == "cpu" and half_bytes(path.parent, "BF16") > EXPANDED_LIMIT else []

        def start(file: Path, options: Any) -> Any:
            # TF32 has the 10 bits of fp16: not what arithmetic fp32 promises.
            told = {"use_tf32": "0"} if device == "cuda" else {}
            providers = [(PROVIDERS[device], told)]
            return onnxruntime.InferenceSession(file, options, providers=providers, disabled_optimizers=left_out)

        def options() -> Any:
            return _session_options(onnxruntime, spec, threads)

        if device == "cpu" and not left_out:
            self._session: Any = optimised(onnxruntime, path, options, start)
        else:
            self._session = start(path, options())
        # ONNX Runtime runs on the CPU, with a warning, where the provider that was asked for cannot start.
        if (found := self._session.get_providers()[0]) != PROVIDERS[device]:
            raise BackendError(
                f"found {found} for device {device!r}; expected {PROVIDERS[device]}, which is installed but does not "
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
        if self.device != "cpu":
            return self._run_bound(values)
        results = self._session.run_with_ort_values(self._outputs, values)
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}

    def _run_bound(self, values: dict[str, Any]) -> dict[str, Array]:
        """Run on values that lie on the device: what is bound was copied there once; outputs come back at the end."""
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cuda")
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))

    def _rest(self) -> None:
        """Only a run can shrink an arena; graphs that run once a picture have none."""

    def _release(self) -> None:
        self._session = None
        self._bound_values = {}

    def _value(self, array: Array) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array, "cpu" if self.device == "cpu" else "cuda")


def _session_options(library: Any, spec: GraphSpec, threads: int | None) -> Any:
    options = library.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised as well
    # A pattern is a second arena for a shape that came before: 2.3 GB with Stable Diffusion 1.5 at 512 x 512.
    options.enable_mem_pattern = False
    # Else the threads of a session spin on after its run, in the way of the session that runs next: the graphs of
    # mini in parts took 1.2 to 1.7 times as long (two cores, n = 5).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # The arena keeps what it had for the next run: quicker every step, and 1 GB for nothing once a picture.
    options.enable_cpu_mem_arena = spec.name in (DENOISER, *UNET_SPLIT_GRAPHS)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
