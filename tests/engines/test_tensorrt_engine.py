# ruff: noqa: N802, N815 - the fakes have the names of what they stand for
"""The engine of TensorRT against explicit fakes of TensorRT and of the CUDA runtime.

No GPU runs here. The fakes keep device memory as bytes at addresses, run "kernels" on those bytes in the order of the
stream, and refuse what the real ones would: memory that was freed, calls that may not be made while capturing, objects
used after what they depend on is gone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lsast_engines import tensorrt
from lsast_engines.engine_key import ANY_GPU, EngineKey, EngineRecord, Library, graph_digest
from lsast_engines.errors import BackendError, StyleError, UsageError
from lsast_engines.profile import Ranges, Span
from lsast_engines.resident import ResidentStyles
from lsast_engines.spec import DENOISER, Geometry, graph_specs
from lsast_engines.style import Style
from lsast_engines.tensorrt import TensorRtEngine

GEOMETRY = Geometry(hint_channels=2, tokens=3, unet_width=6, control_width=4)
SPEC = graph_specs(GEOMETRY)[DENOISER]
RANGES = Ranges(Span(64, 64, 128), Span(1, 1, 3))
VERSION = "1.7.1"


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


class FakeCuda:
    """`cuda.bindings.runtime`: every call returns (status, values…)."""

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, capability: tuple[int, int] = (8, 9), count: int = 1) -> None:
        self.capability, self.count = capability, count
        self.memory: dict[int, bytearray] = {}
        self.calls: list[str] = []
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.streams: set[int] = set()
        self.room = 1 << 30
        self.objects: list[str] = []
        self._next = 0x1000

    def _handle(self) -> int:
        self._next += 0x1000000
        return self._next

    def view(self, address: int, count: int) -> memoryview:
        for start, block in self.memory.items():
            if start <= address and address + count <= start + len(block):
                return memoryview(block)[address - start : address - start + count]
        raise AssertionError(f"{count} bytes at {address:#x} are no memory of the device")

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        assert stream in self.streams, "work on a stream that is closed"
        if self.captured is not None:
            self.captured.append(work)
        else:
            work()

    def _may_not_capture(self, name: str) -> Status:
        self.calls.append(name)
        return Status.cudaSuccess if self.captured is None else Status.cudaErrorStreamCaptureUnsupported

    def cudaGetDeviceCount(self) -> tuple[Status, int]:
        return Status.cudaSuccess, self.count

    def cudaGetDeviceProperties(self, index: int) -> tuple[Status, Any]:
        major, minor = self.capability
        return Status.cudaSuccess, SimpleNamespace(name=b"Fake GPU\0", major=major, minor=minor, totalGlobalMem=1 << 30)

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return Status.cudaSuccess, status.name.encode()

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        assert flags == self.cudaStreamNonBlocking
        handle = self._handle()
        self.streams.add(handle)
        return self._may_not_capture("create"), handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        assert not self.memory, "the stream goes last"
        assert not self.executables, "graphs go before their stream"
        assert not self.objects, "the library's objects go before the stream they used"
        self.streams.remove(stream)
        return (self._may_not_capture("destroy"),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        assert stream in self.streams
        return (self._may_not_capture("wait"),)

    def cudaMalloc(self, count: int) -> tuple[Status, int | None]:
        status = self._may_not_capture("malloc")
        if sum(map(len, self.memory.values())) + count > self.room:
            return Status.cudaErrorMemoryAllocation, None
        address = self._handle()
        self.memory[address] = bytearray(b"\xa5" * count)  # never zeros by chance
        return status, address

    def cudaFree(self, address: int) -> tuple[Status]:
        assert address in self.memory, "freed twice, or never allocated"
        del self.memory[address]
        return (self._may_not_capture("free"),)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> tuple[Status]:
        self.calls.append({1: "upload", 2: "download", 3: "copy"}[kind])

        def work() -> None:
            if kind == 1:
                self.view(target, count)[:] = ctypes.string_at(source, count)
            elif kind == 2:
                ctypes.memmove(target, bytes(self.view(source, count)), count)
            else:
                self.view(target, count)[:] = bytes(self.view(source, count))

        self.submit(stream, work)
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Status]:
        assert mode == 1
        assert self.captured is None
        self.captured = []
        self.calls.append("begin capture")
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, int]:
        assert self.captured is not None
        handle = self._handle()
        self.graphs[handle], self.captured = self.captured, None
        self.calls.append("end capture")
        return Status.cudaSuccess, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, int]:
        handle = self._handle()
        self.executables[handle] = list(self.graphs[graph])
        return self._may_not_capture("instantiate"), handle

    def cudaGraphDestroy(self, graph: int) -> tuple[Status]:
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Status]:
        del self.executables[executable]
        return (self._may_not_capture("free graph"),)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Status]:
        self.calls.append("launch")
        for work in self.executables[executable]:
            self.submit(stream, work)
        return (Status.cudaSuccess,)


def step(feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What the fake's kernel computes of the denoiser's inputs: every input counts, every picture for itself."""
    picture = feeds["latent"] + feeds["hint"].mean(1, keepdims=True) * feeds["control_scale"]
    picture = picture + (feeds["timestep"] + feeds["kv_control"].sum((1, 2)))[:, None, None, None]
    return np.asarray(picture[None] * feeds["kv_unet"].mean((2, 3))[:, :, None, None, None], np.float32)


class FakeTrt:
    """`tensorrt` or `tensorrt_rtx`, as far as running goes; engines are JSON of the profile."""

    __version__ = VERSION
    TensorIOMode = IntEnum("TensorIOMode", ["INPUT", "OUTPUT"])
    CudaGraphStrategy = IntEnum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
    ILogger = type("ILogger", (), {"Severity": IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO"])})

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.logger: Any = None
        self.failing = False
        self.configs: list[Any] = []
        self.kernels = b"compiled for this GPU"

    def nptype(self, dtype: str) -> type:
        return np.dtype(dtype).type

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        return _Object(self.cuda, "runtime", deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, data: bytes) -> Any:
        if not data.startswith(b"{"):
            self.logger.log(self.ILogger.Severity.ERROR, "Serialization assertion magicTag failed")
            return None
        return FakeEngine(self, json.loads(data))


class _Object:
    """Something of the library that must be gone before the stream is."""

    def __init__(self, cuda: FakeCuda, name: str, **members: Any) -> None:
        cuda.objects.append(name)
        self._cuda, self._name = cuda, name
        self.__dict__.update(members)

    def __del__(self) -> None:
        self._cuda.objects.remove(self._name)


class FakeEngine(_Object):
    def __init__(self, trt: FakeTrt, profile: dict[str, Any]) -> None:
        super().__init__(trt.cuda, "engine")
        self.trt, self.profile = trt, profile
        self.tensors = {tensor.name: tensor for tensor in (*SPEC.inputs, *SPEC.outputs)}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return self.tensors[name].dtype

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.OUTPUT if name == "eps" else self.trt.TensorIOMode.INPUT

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        assert index == 0
        return list(self.profile[name])

    def create_execution_context(self, config: Any = None) -> FakeContext:
        return FakeContext(self)

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(known=b"")
        cache.deserialize = lambda blob: bool(setattr(cache, "known", blob)) or True
        trt = self.trt
        cache.serialize = lambda: trt.kernels
        config = SimpleNamespace(create_runtime_cache=lambda: cache, cache=None)
        config.set_runtime_cache = lambda given: setattr(config, "cache", given)
        self.trt.configs.append(config)
        return config


class FakeContext(_Object):
    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(engine.trt.cuda, "context")
        self.engine, self.trt, self.cuda = engine, engine.trt, engine.trt.cuda
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.cuda.memory
        self.addresses[name] = address
        self.cuda.calls.append("address")
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.cuda.executables, "shapes are part of a graph"
        assert isinstance(shape, tuple)
        self.shapes[name] = shape
        self.cuda.calls.append("shape")
        return True

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in SPEC.inputs if tensor.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> list[int]:
        assert name == "eps"
        return [*self.shapes["kv_unet"][:2], *self.shapes["latent"][1:]]

    def execute_async_v3(self, stream: int) -> bool:
        self.cuda.calls.append("execute")
        if self.trt.failing:
            self.trt.logger.log(self.trt.ILogger.Severity.ERROR, "Cuda Runtime (an illegal memory access)")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)  # a graph keeps those of its capture

        def work() -> None:
            feeds = {}
            for tensor in SPEC.inputs:
                count = int(np.prod(shapes[tensor.name], dtype=int)) * np.dtype(tensor.dtype).itemsize
                data = bytes(self.cuda.view(addresses[tensor.name], count))
                feeds[tensor.name] = np.frombuffer(data, tensor.dtype).reshape(shapes[tensor.name])
            eps = step(feeds)
            self.cuda.view(addresses["eps"], eps.nbytes)[:] = eps.tobytes()

        self.cuda.submit(stream, work)
        return True


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(cuda: FakeCuda) -> FakeTrt:
    return FakeTrt(cuda)


Open = Callable[..., TensorRtEngine]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "bundle" / "denoiser.onnx"
    path.parent.mkdir()
    path.write_bytes(b"a graph")
    return path


def compiled(file: Path, folder: Path, library: Library = "tensorrt", content: bytes = b"", **changes: Any) -> Path:
    """What compiling would have left in `folder`."""
    profile = RANGES.profile(SPEC)
    content = content or json.dumps(profile).encode()
    key = EngineKey(
        graph=DENOISER,
        onnx=graph_digest(file),
        profile=profile,
        arithmetic="fp16",
        library=library,
        library_version=VERSION,
        targets=("8.9",),
        gpu="Fake GPU" if library == "tensorrt" else ANY_GPU,
    )
    folder.mkdir(parents=True, exist_ok=True)
    engine = folder / "denoiser.engine"
    engine.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    key = dataclasses.replace(key, **changes)
    EngineRecord(key=key, sha256=digest, bytes=len(content), seconds=41.6, lsast_version="0").save(engine)
    return engine


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tensorrt, "engine_folder", lambda bundle, library, arithmetic: tmp_path / library / arithmetic)
    return tmp_path / "tensorrt" / "fp16"


@pytest.fixture
def open_it(graph: Path, folder: Path, cuda: FakeCuda, trt: FakeTrt) -> Iterator[Open]:
    opened = []

    def open_engine(library: Library = "tensorrt") -> TensorRtEngine:
        engine = TensorRtEngine(graph, SPEC, "cuda", None, "fp16", library=library, trt=trt, runtime=cuda)
        opened.append(engine)
        return engine

    yield open_engine
    for engine in opened:
        engine.close()
    assert not cuda.memory
    assert not cuda.streams
    assert not cuda.graphs
    assert not cuda.executables
    assert not cuda.objects


def inputs(batch: int = 2, rows: int = 2, height: int = 8, width: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return {
        "latent": normal(batch, 4, height, width),
        "hint": normal(batch, 2, height, width),
        "timestep": rng.integers(0, 1000, batch),
        "kv_unet": normal(rows, batch, 3, 6),
        "kv_control": normal(batch, 3, 4),
        "control_scale": np.asarray(0.7, np.float32),
    }


def test_runs_give_what_the_kernel_computes(graph: Path, folder: Path, open_it: Open) -> None:
    compiled(graph, folder)
    engine = open_it()
    for seed, shape in enumerate([(2, 2, 8, 12), (2, 2, 8, 12), (2, 2, 8, 12), (1, 1, 16, 16), (3, 2, 8, 8)]):
        feeds = inputs(*shape, seed=seed)
        np.testing.assert_array_equal(engine(feeds)["eps"], step(feeds))


def test_the_graph_gives_the_same_bytes_as_the_plain_run(
    graph: Path, folder: Path, open_it: Open, cuda: FakeCuda
) -> None:
    compiled(graph, folder)
    engine = open_it()
    plain = engine(inputs())["eps"].copy()
    assert "launch" not in cuda.calls
    for _ in range(3):
        np.testing.assert_array_equal(engine(inputs())["eps"], plain)
    assert cuda.calls.count("execute") == 2  # once plainly, once into the graph
    assert cuda.calls.count("launch") == 3


def test_nothing_is_allocated_or_addressed_after_opening(
    graph: Path, folder: Path, open_it: Open, cuda: FakeCuda
) -> None:
    compiled(graph, folder)
    engine = open_it()
    assert cuda.calls.count("malloc") == cuda.calls.count("address") == len(SPEC.inputs) + len(SPEC.outputs)
    # By hand from the profile: 3 pictures of 16 x 16 cells, two rows for guidance.
    assert sorted(map(len, cuda.memory.values())) == sorted(
        4 * size for size in (3 * 4 * 256, 3 * 2 * 256, 3 * 2, 2 * 3 * 18, 3 * 12, 1, 2 * 3 * 4 * 256)
    )
    opened = len(cuda.calls)
    for shape in [(1, 2, 8, 8), (1, 2, 8, 8), (3, 2, 16, 16), (3, 2, 16, 16)]:
        engine(inputs(*shape))
    assert not {"malloc", "address", "free"} & set(cuda.calls[opened:])


def test_new_shapes_drop_the_graph_and_capture_another(
    graph: Path, folder: Path, open_it: Open, cuda: FakeCuda
) -> None:
    compiled(graph, folder)
    engine = open_it()
    for _ in range(2):
        engine(inputs())
    assert len(cuda.executables) == 1
    feeds = inputs(1, 2, 16, 16)
    np.testing.assert_array_equal(engine(feeds)["eps"], step(feeds))
    assert not cuda.executables
    engine(feeds)
    assert len(cuda.executables) == 1


def test_what_is_bound_is_uploaded_once(graph: Path, folder: Path, open_it: Open, cuda: FakeCuda) -> None:
    compiled(graph, folder)
    engine = open_it()
    feeds = inputs()
    fed = {name: feeds.pop(name) for name in ("latent", "timestep")}
    engine.bind(feeds)
    expected = step({**fed, **feeds})
    feeds["hint"][:] = 0  # the caller's array is its own again
    cuda.calls.clear()
    for _ in range(3):
        np.testing.assert_array_equal(engine(fed)["eps"], expected)
    assert cuda.calls.count("upload") == 3 * 2
    assert cuda.calls.count("download") == 3


def style(name: str, stages: int, seed: int) -> Style:
    rng = np.random.default_rng(seed)
    return Style(name, "b" * 64, stages, 3, rng.standard_normal((stages, 3, 6)), rng.standard_normal((stages, 3, 4)))


def test_resident_styles_are_bound_row_by_row_on_the_device(
    graph: Path, folder: Path, open_it: Open, cuda: FakeCuda
) -> None:
    compiled(graph, folder)
    engine = open_it()
    null, one, two = style("null", 1, 1), style("one", 10, 2), style("two", 10, 3)
    styles = ResidentStyles(engine, null)
    styles.add("one", one)
    styles.add("two", two)
    feeds = inputs()
    del feeds["kv_unet"], feeds["kv_control"]
    cuda.calls.clear()
    for stage, guided in ((9, True), (9, True), (3, True), (0, False)):
        styles.bind(["one", "two"], stage, guided=guided)
        hands = [one.row(stage), two.row(stage)]
        kv_unet = [hand.kv_unet for hand in hands]
        halves = [[null.row(0).kv_unet] * 2, kv_unet] if guided else [kv_unet]
        rows = {"kv_unet": np.array(halves), "kv_control": np.array([hand.kv_control for hand in hands])}
        np.testing.assert_array_equal(engine(feeds)["eps"], step({**feeds, **rows}))
    assert cuda.calls.count("copy") == 3 * (4 + 2) + (2 + 2)
    assert cuda.calls.count("upload") == 4 * len(feeds)  # no key, no value
    assert "malloc" not in cuda.calls


def test_a_style_swap_runs_the_same_graph(graph: Path, folder: Path, open_it: Open, cuda: FakeCuda) -> None:
    compiled(graph, folder)
    engine = open_it()
    styles = ResidentStyles(engine, style("null", 1, 1))
    styles.add("one", style("one", 10, 2))
    styles.add("two", style("two", 10, 3))
    feeds = inputs(batch=1)
    del feeds["kv_unet"], feeds["kv_control"]
    pictures = []
    for name in ("one", "one", "two"):
        styles.bind([name], 4, guided=True)
        pictures.append(engine(feeds)["eps"].copy())
    assert cuda.calls.count("instantiate") == 1
    assert cuda.calls.count("launch") == 2
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])


def test_styles_give_their_memory_back(graph: Path, folder: Path, open_it: Open, cuda: FakeCuda) -> None:
    compiled(graph, folder)
    styles = ResidentStyles(open_it(), style("null", 1, 1))
    before = len(cuda.memory)
    styles.add("one", style("one", 10, 2))
    styles.add("one", style("one", 5, 3))
    assert len(cuda.memory) == before + 2
    styles.remove("one")
    styles.remove("one")
    assert len(cuda.memory) == before


@pytest.mark.parametrize(
    ("names", "stage", "error", "message"),
    [
        (["three"], 0, UsageError, "found styles three; expected of those added before: one"),
        ([], 0, UsageError, "found styles none"),
        (["one"], 10, UsageError, "found stage 10; expected 0 to 9"),
        (["one"] * 4, 0, BackendError, "was not compiled for this"),
    ],
)
def test_wrong_rows_are_refused_before_anything_is_copied(
    graph: Path, folder: Path, open_it: Open, cuda: FakeCuda, names: list[str], stage: int, error: Any, message: str
) -> None:
    compiled(graph, folder)
    styles = ResidentStyles(open_it(), style("null", 1, 1))
    styles.add("one", style("one", 10, 2))
    with pytest.raises(error, match=message):
        styles.bind(names, stage, guided=True)
    assert "copy" not in cuda.calls


def test_a_style_of_other_widths_is_refused(graph: Path, folder: Path, open_it: Open) -> None:
    compiled(graph, folder)
    wide = Style("wide", "b" * 64, 1, 3, np.zeros((1, 3, 8)), np.zeros((1, 3, 4)))
    with pytest.raises(StyleError, match=r"found kv_unet rows of \[3, 8\]; expected \[3, 6\]"):
        ResidentStyles(open_it(), wide)


def test_rtx_captures_by_itself_and_keeps_its_kernels(
    graph: Path, folder: Path, open_it: Open, cuda: FakeCuda, trt: FakeTrt, tmp_path: Path
) -> None:
    compiled(graph, tmp_path / "tensorrt-rtx" / "fp16", "tensorrt-rtx")
    engine = open_it("tensorrt-rtx")
    for _ in range(3):
        np.testing.assert_array_equal(engine(inputs())["eps"], step(inputs()))
    assert "begin capture" not in cuda.calls
    assert trt.configs[0].cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    engine.close()
    kept = tmp_path / "tensorrt-rtx" / "fp16" / "denoiser.engine.kernels"
    assert kept.read_bytes() == trt.kernels
    open_it("tensorrt-rtx")
    assert trt.configs[1].cache.known == trt.kernels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"onnx": "0" * 64}, "onnx: found"),
        ({"graph": "decoder"}, "graph: found decoder; expected denoiser"),
        ({"library_version": "1.6.0"}, "library_version: found 1.6.0; expected 1.7.1"),
        ({"arithmetic": "fp32"}, "arithmetic: found fp32; expected fp16"),
        ({"targets": ("8.6",)}, "targets: found 8.6; expected 8.9, that of the GPU"),
        ({"gpu": "Other GPU"}, "gpu: found Other GPU; expected Fake GPU"),
    ],
)
def test_an_engine_of_something_else_is_refused_by_the_field(
    graph: Path, folder: Path, open_it: Open, cuda: FakeCuda, changes: dict[str, Any], message: str
) -> None:
    compiled(graph, folder, **changes)
    with pytest.raises(BackendError, match=message) as caught:
        open_it()
    assert "it took 42 s last time) with: lsast-export compile" in str(caught.value)
    assert cuda.calls == []


def test_a_stale_engine_is_refused(graph: Path, folder: Path, open_it: Open) -> None:
    compiled(graph, folder)
    graph.write_bytes(b"a graph, exported again")
    with pytest.raises(BackendError, match=r"onnx: found [0-9a-f]{12}…; expected [0-9a-f]{12}…"):
        open_it()


def test_a_missing_or_truncated_engine_names_the_command(graph: Path, folder: Path, open_it: Open) -> None:
    with pytest.raises(
        BackendError, match=r"found no engine .*\ncompile with: lsast-export compile .* --backend tensorrt"
    ):
        open_it()
    engine = compiled(graph, folder)
    engine.write_bytes(engine.read_bytes()[:100])
    with pytest.raises(BackendError, match=r"bytes: found 100; expected \d+"):
        open_it()


def test_what_the_library_refuses_comes_with_its_words(graph: Path, folder: Path, open_it: Open) -> None:
    compiled(graph, folder, content=b"no engine, but recorded as one")
    with pytest.raises(BackendError, match=r"refuses .*\n.*magicTag"):
        open_it()


def test_an_engine_of_another_profile_than_recorded_is_refused(graph: Path, folder: Path, open_it: Open) -> None:
    other = json.dumps(Ranges(Span(64, 64, 256)).profile(SPEC)).encode()
    compiled(graph, folder, content=other)
    with pytest.raises(BackendError, match=r"latent: found profile .*; expected"):
        open_it()


def test_no_gpu_is_one_line(graph: Path, folder: Path, open_it: Open, cuda: FakeCuda) -> None:
    compiled(graph, folder)
    cuda.count = 0
    with pytest.raises(BackendError, match="found no NVIDIA GPU for tensorrt"):
        open_it()


def test_too_little_memory_leaves_nothing_behind(graph: Path, folder: Path, open_it: Open, cuda: FakeCuda) -> None:
    compiled(graph, folder)
    cuda.room = 20_000
    with pytest.raises(BackendError, match="cudaMalloc failed: cudaErrorMemoryAllocation"):
        open_it()
    assert not cuda.memory
    assert not cuda.streams


@pytest.mark.parametrize("runs", [0, 1])
def test_a_run_that_fails_says_why_and_the_stream_serves_on(
    graph: Path, folder: Path, open_it: Open, cuda: FakeCuda, trt: FakeTrt, runs: int
) -> None:
    compiled(graph, folder)
    engine = open_it()
    for _ in range(runs):
        engine(inputs())
    trt.failing = True
    with pytest.raises(BackendError, match="an illegal memory access"):
        engine(inputs())
    assert cuda.captured is None
    trt.failing = False
    np.testing.assert_array_equal(engine(inputs())["eps"], step(inputs()))


def test_shapes_beyond_the_profile_are_refused(graph: Path, folder: Path, open_it: Open, cuda: FakeCuda) -> None:
    compiled(graph, folder)
    engine = open_it()
    with pytest.raises(BackendError, match=r"latent: found \[4, 4, 8, 12\]; expected \[1, 4, 8, 8\] to"):
        engine(inputs(batch=4))
    assert "execute" not in cuda.calls


def test_a_closed_engine_is_closed(graph: Path, folder: Path, open_it: Open, cuda: FakeCuda) -> None:
    compiled(graph, folder)
    engine = open_it()
    engine(inputs())
    engine(inputs())
    engine.close()
    engine.close()
    assert cuda.calls[-1] == "destroy"
    with pytest.raises(BackendError, match="is closed"):
        engine(inputs())
