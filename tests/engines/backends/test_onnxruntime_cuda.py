# ruff: noqa: N802 - the fakes have the names of what they stand for
"""ONNX Runtime's CUDA provider where no GPU is: sessions and bindings are real ones on the CPU, which say "cuda"."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lsast_engines.backends.base import Engine
from lsast_engines.backends.onnxruntime import (
    GPU_SUFFIX,
    KEPT_SESSIONS,
    PROVIDERS,
    OnnxRuntimeEngine,
    cuda_fault,
    devices,
)
from lsast_engines.backends.registry import open_engine
from lsast_engines.errors import BackendError, UsageError

MISSING = "Failed to load libcublas.so.13: cannot open shared object file\nPlease follow https://onnxruntime.ai"
OLD_DRIVER = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW> CUDA failure 35: CUDA "
    "driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=vm ; line=160"
)


class FakeRuntime:
    """The module `onnxruntime` of the GPU wheel, on a machine with a card unless a `fault` says otherwise."""

    __version__ = "1.31.1"

    def __init__(self, real: Any, folder: Path, fault: str = "", provider: str = PROVIDERS["cuda"]) -> None:
        self.real, self.fault, self.provider = real, fault, provider
        (folder / "capi").mkdir(parents=True)
        self.__file__ = str(folder / "__init__.py")
        self.opened: list[dict[str, int]] = []
        self.told: dict[str, str] = {}
        self.uploads: list[int] = []
        self.OrtValue = SimpleNamespace(
            ortvalue_from_numpy=self._probe, ortvalue_from_shape_and_type=lambda *given: _Value(self, *given)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_available_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        if self.fault == MISSING:
            print(MISSING)  # noqa: T201 - as the real one, on stdout

    def _probe(self, array: np.ndarray, device: str, index: int) -> None:
        assert (device, index) == ("cuda", 0)
        if self.fault:
            raise RuntimeError(self.fault)

    def SessionOptions(self) -> Any:
        return _Options(self.real.SessionOptions(), {})

    def InferenceSession(self, path: Path, options: _Options, providers: Any, **asked: Any) -> Any:
        ((name, self.told),) = providers
        assert (name, asked["enable_fallback"]) == (PROVIDERS["cuda"], 0)
        self.opened.append(options.lengths)
        session = self.real.InferenceSession(path, options.real, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: [self.provider, "CPUExecutionProvider"]
        binding = session.io_binding
        session.io_binding = lambda: _Binding(binding())
        run = session.run_with_iobinding
        session.run_with_iobinding = lambda bound: run(bound.real)
        return session


class _Options:
    def __init__(self, real: Any, lengths: dict[str, int]) -> None:
        self.__dict__.update(real=real, lengths=lengths)

    def add_free_dimension_override_by_name(self, axis: str, length: int) -> None:
        self.lengths[axis] = length
        self.real.add_free_dimension_override_by_name(axis, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)


class _Value:
    """A value on the device."""

    def __init__(self, runtime: FakeRuntime, shape: list[int], dtype: type, device: str, index: int) -> None:
        assert (device, index) == ("cuda", 0)
        self.uploads = runtime.uploads
        self.real = runtime.real.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cpu", 0)
        self.numpy = self.real.numpy

    def update_inplace(self, array: np.ndarray) -> None:
        self.uploads.append(array.nbytes)
        self.real.update_inplace(array)


class _Binding:
    def __init__(self, real: Any) -> None:
        self.real = real
        self.bind_ortvalue_input = lambda name, value: real.bind_ortvalue_input(name, value.real)
        self.bind_ortvalue_output = lambda name, value: real.bind_ortvalue_output(name, value.real)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., FakeRuntime]:
    real = pytest.importorskip("onnxruntime")

    def install(loads: bool = True, **options: Any) -> FakeRuntime:
        runtime = FakeRuntime(real, tmp_path / "wheel", **options)
        if loads:
            monkeypatch.setattr("ctypes.CDLL", lambda name: None)
        monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
        return runtime

    return install


def expect(engine: Engine, toy: Any, feeds: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> None:
    found = engine(given)
    for name, values in toy.expected(feeds).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, ""),
        ({"provider": "AzureExecutionProvider"}, "the installed onnxruntime was built without CUDA"),
        (
            {"loads": False, "fault": MISSING},
            r"load \(Failed to load libcublas.so.13: .*: pip install .lsast\[gpu\]",
        ),
        ({"loads": False}, r"does not load \(.*libonnxruntime_providers_cuda.so"),
        (
            {"fault": OLD_DRIVER},
            r"start \(CUDA failure 35: .* is insufficient for CUDA runtime version\); install or",
        ),
        ({"fault": "no device"}, r"does not start \(no device\)"),
    ],
)
def test_cuda_that_does_not_start_says_why(
    fake: Callable[..., FakeRuntime], toy: Any, capsys: pytest.CaptureFixture[str], options: Any, fault: str
) -> None:
    fake(**options)
    assert list(devices()) == (["cpu"] if fault else ["cpu", "cuda"])
    if not fault:
        return
    with pytest.raises(BackendError, match=rf"device 'cuda'; available: .*; onnxruntime: .*{fault}"):
        open_engine(toy.path, toy.spec, "onnxruntime", "cuda")
    with pytest.raises(BackendError, match=f"onnxruntime cannot use device 'cuda': .*{fault}"):
        OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)
    assert capsys.readouterr().out == ""


def test_devices_start_cuda_only_if_the_first_does_not_do(fake: Callable[..., FakeRuntime]) -> None:
    fake(fault=OLD_DRIVER).get_available_providers = None  # type: ignore[method-assign, assignment]
    assert "cpu" in devices()


def test_engine_on_cuda_keeps_a_session_for_each_size(fake: Callable[..., FakeRuntime], toy: Any) -> None:
    runtime = fake()
    engine = OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)
    assert runtime.opened == []
    for length in (5, 6, 5, 7, 5, 6):  # 7 takes the place of 6, then 6 that of 7
        feeds = toy.feeds(length=length)
        expect(engine, toy, feeds, feeds)
    assert [lengths["N"] for lengths in runtime.opened] == [5, 6, 7, 6]
    assert runtime.opened[0] == {"B": 2, "N": 5}
    assert len(engine._kept) == KEPT_SESSIONS
    assert (runtime.told["enable_cuda_graph"], runtime.told["use_tf32"]) == ("1", "0")
    engine.close()


def test_bind_inputs_on_cuda_uploads_once_for_each_session(fake: Callable[..., FakeRuntime], toy: Any) -> None:
    runtime = fake()
    engine = OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)
    first, other = toy.feeds(), toy.feeds(seed=1)
    engine.bind_inputs({"x": first["x"], "scale": first["scale"]})
    for timestep in (first["timestep"], other["timestep"]):
        expect(engine, toy, {**first, "timestep": timestep}, {"timestep": timestep})
    engine.bind_inputs({"scale": other["scale"]})
    expect(engine, toy, {**first, "scale": other["scale"]}, {"timestep": first["timestep"]})
    assert runtime.uploads == [first["x"].nbytes, 4, 16, 16, 4, 16]


def test_engine_writes_its_outputs_to_the_same_memory(toy: Any) -> None:
    """On the CPU, by the same binding as on a GPU, where addresses are part of a CUDA graph."""
    engine = OnnxRuntimeEngine(toy.path, toy.spec, "cpu", None)
    first = engine(toy.feeds())
    kept = {name: value.copy() for name, value in first.items()}
    again = engine(toy.feeds(seed=1))
    assert all(np.shares_memory(first[name], again[name]) for name in first)
    engine.release_memory()
    released = engine(toy.feeds())
    assert not any(np.shares_memory(again[name], released[name]) for name in first)
    assert all(np.array_equal(kept[name], value) for name, value in released.items())
    engine.close()
    assert all(np.array_equal(kept[name], value) for name, value in released.items())  # still there


def test_compute_dtype_is_fp16_on_a_gpu_unless_chosen(fake: Callable[..., FakeRuntime], toy: Any) -> None:
    assert open_engine(toy.path, toy.spec).compute_dtype == "fp32"
    fake()
    graph = toy.path.with_name(f"toy{GPU_SUFFIX}")
    with pytest.raises(BackendError, match=f"found no graph for GPUs .*{graph.name}; export the bundle again"):
        open_engine(toy.path, toy.spec, device="cuda")
    graph.write_bytes(toy.path.read_bytes())
    assert open_engine(toy.path, toy.spec, device="cuda").compute_dtype == "fp16"
    assert open_engine(toy.path, toy.spec, device="cuda", compute_dtype="fp32").compute_dtype == "fp32"
    for device, dtype, found in (("cpu", "fp16", "fp32 on cpu"), ("cuda", "bf16", "fp16 or fp32 on cuda")):
        with pytest.raises(BackendError, match=f"onnxruntime computes in {found}"):
            open_engine(toy.path, toy.spec, "onnxruntime", device, compute_dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["tensorrt", "tensorrt-rtx"])
def test_open_engine_with_a_removed_device_is_refused(toy: Any, device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device} was removed: use --backend {device}$"):
        open_engine(toy.path, toy.spec, "onnxruntime", device)


@pytest.mark.gpu
def test_cuda_computes_the_graph(toy: Any) -> None:
    if fault := cuda_fault():
        pytest.skip(f"onnxruntime: {fault}")
    engine = OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)
    for seed in range(4):  # the first run is captured, the others are its replays
        feeds = toy.feeds(seed=seed)
        expect(engine, toy, feeds, feeds)
