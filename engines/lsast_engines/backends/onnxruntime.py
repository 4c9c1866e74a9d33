"""Graphs on ONNX Runtime: on every CPU, and with its CUDA provider on NVIDIA GPUs."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

from ..bundle.graph_spec import DENOISER, UNET_SPLIT_GRAPHS, GraphSpec
from ..bundle.safetensors_header import read_slots
from ..errors import BackendError
from .base import Array, ComputeDtype, Engine, check_interface
from .graph_cache import open_cached
from .imports import import_library

MAX_FOLDED_BYTES = 1_000_000_000
"""Bytes of bf16 weights up to which they are expanded to float32 once, when the graph is opened.

Above, ONNX Runtime leaves them in the mapped file and expands each at every use: much less memory, a slower step. It
cannot do that with fp16 weights, so large fp16 weights are converted before (`fp32_weights`)."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's name of the provider, by device."""

GRAPH, WEIGHTS = "graph.onnx", "weights.bin"
"""Files of an entry in the graph cache."""

_MIN_EXTERNAL_BYTES = 1024
"""Smaller constants stay in `GRAPH`, since ONNX Runtime computes shapes from them."""

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def devices() -> list[str]:
    """The devices that the installed ONNX Runtime was built for.

    Raises:
        ImportError: it is not installed.
    """
    providers = import_library("onnxruntime").get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in providers]


class OnnxRuntimeEngine(Engine):
    """A graph in an ONNX Runtime session."""

    backend = "onnxruntime"

    def __init__(
        self, path: Path, spec: GraphSpec, device: str, threads: int | None, compute_dtype: ComputeDtype = "fp32"
    ) -> None:
        self._library = import_library("onnxruntime")
        super().__init__(spec, device, compute_dtype)
        if compute_dtype != "fp32":
            raise BackendError(f"onnxruntime computes in fp32, found {compute_dtype}; use openvino for it")
        self._session: Any = _open_session(self._library, path, spec, device, threads)
        # ONNX Runtime runs on the CPU, with a warning, if the requested provider cannot start.
        if (found := self._session.get_providers()[0]) != PROVIDERS[device]:
            raise BackendError(
                f"found {found} for device {device!r}; expected {PROVIDERS[device]}, which is installed but does not "
                "start here: check its driver, or use device 'cpu'"
            )
        inputs = {
            node.name: (
                _DTYPES.get(node.type, node.type),
                tuple(axis if isinstance(axis, int) else None for axis in node.shape),
            )
            for node in self._session.get_inputs()
        }
        outputs = {node.name: _DTYPES.get(node.type, node.type) for node in self._session.get_outputs()}
        check_interface(spec, inputs, outputs, path)
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._bound_values: dict[str, Any] = {}

    def _bind(self, feeds: dict[str, Array]) -> None:
        self._bound_values |= {name: self._value(value) for name, value in feeds.items()}

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        values = self._bound_values | {name: self._value(value) for name, value in feeds.items()}
        if self.device != "cpu":
            return self._run_on_gpu(values)
        results = self._session.run_with_ort_values(self._outputs, values)
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}

    def _run_on_gpu(self, values: dict[str, Any]) -> dict[str, Array]:
        """Run on values in GPU memory, where bound inputs stay; only the outputs are copied back."""
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cuda")
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))

    def _release_memory(self) -> None:
        """ONNX Runtime can shrink an arena only during a run; graphs that run once a picture have no arena."""

    def _close(self) -> None:
        self._session = None
        self._bound_values = {}

    def _value(self, array: Array) -> Any:
        return self._library.OrtValue.ortvalue_from_numpy(array, "cpu" if self.device == "cpu" else "cuda")


def _open_session(library: Any, path: Path, spec: GraphSpec, device: str, threads: int | None) -> Any:
    """A session of the graph file `path`, on the CPU from the graph cache.

    Optimising folds constants, fuses nodes and orders weights for the processor; the cached graph computes the same
    bits.
    """
    large_bf16 = device == "cpu" and _bf16_bytes(path.parent) > MAX_FOLDED_BYTES

    def session(file: Path, options: Any) -> Any:
        # TF32 has the 10 mantissa bits of fp16, which is not what fp32 promises.
        provider_options = {"use_tf32": "0"} if device == "cuda" else {}
        return library.InferenceSession(
            file,
            options,
            providers=[(PROVIDERS[device], provider_options)],
            disabled_optimizers=["ConstantFolding"] if large_bf16 else [],
        )

    def load(entry: Path) -> Any:
        options = _session_options(library, spec, threads)
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
        return session(entry / GRAPH, options)

    def build(entry: Path | None) -> Any:
        options = _session_options(library, spec, threads)
        if entry is not None:
            options.optimized_model_filepath = str(entry / GRAPH)
            prefix = "session.optimized_model_external_initializers"
            options.add_session_config_entry(f"{prefix}_file_name", WEIGHTS)
            options.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(_MIN_EXTERNAL_BYTES))
        return session(path, options)

    if device != "cpu" or large_bf16:
        return build(None)
    # The order of weights depends on the processor: blocks of 16 channels with AVX-512, of 8 without.
    return open_cached("onnxruntime", path, "fp32", f"{library.__version__} {processor()}", load, build)


def _session_options(library: Any, spec: GraphSpec, threads: int | None) -> Any:
    options = library.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised as well
    # A memory pattern is a second arena for every shape that came before, gigabytes with Stable Diffusion 1.5.
    options.enable_mem_pattern = False
    # Otherwise a session's threads spin on after its run and slow down the session that runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # An arena keeps its memory for the next run: good for graphs that run every step, a waste for the others.
    options.enable_cpu_mem_arena = spec.name in (DENOISER, *UNET_SPLIT_GRAPHS)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _bf16_bytes(folder: Path) -> int:
    """Bytes of bf16 tensors in the safetensors files of `folder`; an unreadable file counts as 0."""
    count = 0
    for file in folder.glob("*.safetensors"):
        try:
            count += sum(slot.length for slot in read_slots(file).values() if slot.dtype == "BF16")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return count


@functools.cache
def processor() -> str:
    """The model and instruction sets of the processor, as far as the system reports them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.is_file() else []
    keys = ("model name", "flags", "Features", "CPU part")
    facts = [line for line in lines if line.partition("\t")[0].strip() in keys]
    return " ".join([platform.machine(), platform.processor(), *facts])
