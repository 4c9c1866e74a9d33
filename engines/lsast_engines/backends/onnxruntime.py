"""Graphs on ONNX Runtime: on every CPU, and with its CUDA provider on NVIDIA GPUs.

On both, inputs and outputs lie at fixed addresses (IO binding). On a GPU a session is opened for each picture size,
with all axes fixed, and its first run is captured as a CUDA graph, so that later runs allocate nothing.
"""

import contextlib
import ctypes
import io
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.graph_spec import DENOISER, UNET_SPLIT_GRAPHS, GraphSpec, TensorSpec
from ..bundle.safetensors_header import read_slots
from ..environment import processor
from ..errors import BackendError, install_command
from .base import Array, ComputeDtype, Engine, Shape, axis_lengths, check_interface, import_library
from .graph_cache import MAX_WEIGHT_BYTES, open_cached, weight_bytes

MAX_FOLDED_BYTES = 1_000_000_000
"""Bytes of bf16 weights up to which they are expanded to float32 once, when the graph is opened. Above, ONNX Runtime
leaves them in the mapped file and expands each at every use: much less memory, a slower step. It cannot do that with
fp16 weights, so large fp16 weights are converted before (`fp32_weights`)."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's name of the provider, by device."""

GPU_SUFFIX = ".fp16.onnx"
"""Suffix of a graph for GPUs, which lies beside the graph of the same name: in fp16, but the encoder's in float32."""

KEPT_SESSIONS = 2
"""Picture sizes for which a GPU session is kept, e.g. portrait and landscape; each holds the weights once."""

# AVX2 without VNNI adds products of u8 and i8 in 16 bits, which overflow. So ONNX Runtime takes weights as u8 there;
# on other processors this has no effect.
_EXACT_INT8 = ("session.x64quantprecision", "1")
_GRAPH, _WEIGHTS = "graph.onnx", "weights.bin"  # files of an entry in the graph cache
_MIN_EXTERNAL_BYTES = 1024  # smaller constants stay in `_GRAPH`, since ONNX Runtime computes shapes from them

_CUDA_OPTIONS = {
    "use_tf32": "0",  # it has the 10 mantissa bits of fp16, which is not what fp32 promises
    "enable_cuda_graph": "1",
    "prefer_nhwc": "1",
    "arena_extend_strategy": "kSameAsRequested",
}
"""Options of the CUDA provider (onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html)."""

_DRIVER = "install or update the NVIDIA driver; nvidia-smi shows it"

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def devices() -> Iterator[str]:
    """The devices that ONNX Runtime can use here; CUDA is started only if the caller asks for a second one. An
    ImportError if ONNX Runtime is not installed."""
    import_library("onnxruntime")
    yield "cpu"
    if not gpu_fault():
        yield "cuda"


def gpu_fault() -> str:
    """Why ONNX Runtime cannot start CUDA here, in its own words or the linker's, and what helps; empty if it can.
    Raises as `devices`."""
    library = import_library("onnxruntime")
    if PROVIDERS["cuda"] not in library.get_available_providers():
        return (
            "the installed onnxruntime was built without CUDA; for the one with it: pip uninstall -y onnxruntime, then "
            f"{install_command('gpu')}"
        )
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # stdout is for results
        library.preload_dlls()
    missing = "; ".join(line for line in printed.getvalue().splitlines() if line.startswith("Failed"))
    names = {"win32": "onnxruntime_providers_cuda.dll"}
    file = Path(library.__file__).parent / "capi" / names.get(sys.platform, "libonnxruntime_providers_cuda.so")
    try:
        ctypes.CDLL(str(file))
    except OSError as error:
        mend = _DRIVER if "libcuda.so" in f"{missing} {error}" else f"for CUDA's libraries: {install_command('gpu')}"
        return f"its CUDA provider does not load ({missing or error}); {mend}"
    try:
        library.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except Exception as error:  # ONNX Runtime raises exceptions of no common base
        found = re.search(r"(CUDA|CUDNN|CUBLAS) failure \d+: [^;]*", str(error))
        return f"its CUDA provider does not start ({found[0].strip() if found else error}); {_DRIVER}"
    return ""


class OnnxRuntimeEngine(Engine):
    """A graph in ONNX Runtime sessions: one on a CPU, on a GPU one for each set of input shapes.

    It is the graph file `path`, or with fp16 the graph for GPUs beside it.

    Raises:
        ImportError: ONNX Runtime is not installed.
        BackendError: CUDA cannot start, or there is no graph for GPUs.
    """

    backend = "onnxruntime"

    def __init__(
        self, path: Path, spec: GraphSpec, device: str, threads: int | None, compute_dtype: ComputeDtype = "fp32"
    ) -> None:
        self._library = import_library("onnxruntime")
        super().__init__(spec, device, compute_dtype)
        self._path, self._threads = path, threads
        if compute_dtype == "bf16":
            raise BackendError("onnxruntime computes in fp32, and on GPUs in fp16; found bf16: use openvino for it")
        if compute_dtype == "fp16":
            self._path = path.with_name(f"{path.stem}{GPU_SUFFIX}")
            if not self._path.is_file():
                raise BackendError(
                    f"found no graph for GPUs {self._path}; export the bundle again (one in int8 has none: use the "
                    "bundle that it was made from), or use compute_dtype fp32"
                )
        self._kept: OrderedDict[tuple[Shape, ...], _BoundSession] = OrderedDict()
        self._session: Any = None
        # Of a small bundle the arena is small, and filling it anew would slow down every picture.
        self._shrinks = _has_arena(spec) and weight_bytes(path.parent) >= MAX_WEIGHT_BYTES
        if device == "cpu":
            self._session = self._open({})
        elif fault := gpu_fault():
            raise BackendError(f"onnxruntime cannot use device {device!r}: {fault}")

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        shapes = {name: value.shape for name, value in {**self._bound, **feeds}.items()}
        key = tuple(shapes[tensor.name] for tensor in self.spec.inputs)
        if key not in self._kept:
            while len(self._kept) >= (1 if self._session else KEPT_SESSIONS):
                self._kept.popitem(last=False)
            lengths = axis_lengths(self.spec, shapes)
            session = self._session or self._open(lengths)
            self._kept[key] = _BoundSession(self._library, session, self.spec, lengths, self.device)
        self._kept.move_to_end(key)
        return self._kept[key](self._bound, feeds)

    def _release_memory(self) -> None:
        if self.device == "cpu":
            if self._shrinks:
                for bound in self._kept.values():
                    bound.shrink_arena()
            self._kept.clear()

    def _close(self) -> None:
        self._session = None
        self._kept = OrderedDict()

    def _open(self, lengths: Mapping[str, int]) -> Any:
        """A session in which the named axes have these lengths, on the CPU from the graph cache: the same bits."""
        large_bf16 = self.device == "cpu" and _bf16_bytes(self._path.parent) > MAX_FOLDED_BYTES

        def session(file: Path, options: Any) -> Any:
            return self._library.InferenceSession(
                file,
                options,
                providers=[(PROVIDERS[self.device], _CUDA_OPTIONS if self.device == "cuda" else {})],
                disabled_optimizers=["ConstantFolding"] if large_bf16 else [],
                enable_fallback=0,  # it prints on stdout, and hides the error
            )

        def load(entry: Path) -> Any:
            options = self._session_options()
            options.graph_optimization_level = self._library.GraphOptimizationLevel.ORT_DISABLE_ALL
            return session(entry / _GRAPH, options)

        def build(entry: Path | None) -> Any:
            options = self._session_options()
            for axis, length in lengths.items():
                options.add_free_dimension_override_by_name(axis, length)
            if entry is not None:
                options.optimized_model_filepath = str(entry / _GRAPH)
                prefix = "session.optimized_model_external_initializers"
                options.add_session_config_entry(f"{prefix}_file_name", _WEIGHTS)
                options.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(_MIN_EXTERNAL_BYTES))
            return session(self._path, options)

        if self.device != "cpu" or large_bf16:
            opened = build(None)
        else:
            # The order of weights depends on the processor: blocks of 16 channels with AVX-512, of 8 without.
            environment = f"{self._library.__version__} {processor()} {' '.join(_EXACT_INT8)}"
            opened = open_cached("onnxruntime", self._path, self.compute_dtype, environment, load, build)
        # A provider that cannot start may be left out without an error.
        if (found := opened.get_providers()[0]) != PROVIDERS[self.device]:
            raise BackendError(f"found {found} for device {self.device!r}; expected {PROVIDERS[self.device]}")
        inputs = {
            node.name: (
                _DTYPES.get(node.type, node.type),
                tuple(axis if isinstance(axis, int) and not lengths else None for axis in node.shape),
            )
            for node in opened.get_inputs()
        }
        outputs = {node.name: _DTYPES.get(node.type, node.type) for node in opened.get_outputs()}
        check_interface(self.spec, inputs, outputs, self._path)
        return opened

    def _session_options(self) -> Any:
        options = self._library.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        # A memory pattern is a second arena for every shape that came before, gigabytes with Stable Diffusion 1.5.
        options.enable_mem_pattern = False
        # Otherwise a session's threads spin on after its run and slow down the session that runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry(*_EXACT_INT8)
        options.enable_cpu_mem_arena = _has_arena(self.spec)
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        return options


class _BoundSession:
    """A session whose inputs and outputs lie at fixed addresses on its device."""

    def __init__(self, library: Any, session: Any, spec: GraphSpec, lengths: Mapping[str, int], device: str) -> None:
        def allocate(tensor: TensorSpec) -> Any:
            shape = [axis if isinstance(axis, int) else lengths[axis] for axis in tensor.shape]
            return library.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(tensor.dtype).type, device, 0)

        self._library, self._session, self._binding = library, session, session.io_binding()
        self._inputs = {tensor.name: allocate(tensor) for tensor in spec.inputs}
        self._outputs = {tensor.name: allocate(tensor) for tensor in spec.outputs}
        self._held: dict[str, Array] = {}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def __call__(self, bound: Mapping[str, Array], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on `feeds` and `bound`; of the latter, arrays that were there at the last run are not copied again."""
        changed = {name: value for name, value in bound.items() if self._held.get(name) is not value}
        for name, value in {**changed, **feeds}.items():
            self._inputs[name].update_inplace(value)
        self._held = dict(bound)
        self._session.run_with_iobinding(self._binding)
        return {name: value.numpy() for name, value in self._outputs.items()}

    def shrink_arena(self) -> None:
        # ONNX Runtime shrinks an arena only at the end of a run; this one is terminated before its first node.
        options = self._library.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        options.terminate = True
        options.log_severity_level = 4  # fatal: that it was terminated is no news
        with contextlib.suppress(RuntimeError):
            self._session.run_with_iobinding(self._binding, options)


def _has_arena(spec: GraphSpec) -> bool:
    """An arena keeps its memory for the next run: good for graphs that run every step, a waste for the others."""
    return spec.name in (DENOISER, *UNET_SPLIT_GRAPHS)


def _bf16_bytes(folder: Path) -> int:
    """Bytes of bf16 tensors in the safetensors files of `folder`; an unreadable file counts as 0."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError, ValueError):
            count += sum(slot.length for slot in read_slots(file).values() if slot.dtype == "BF16")
    return count
