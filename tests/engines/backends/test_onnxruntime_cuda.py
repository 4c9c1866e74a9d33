# ruff: noqa: N802 - the fakes have the names of what they stand for
"""ONNX Runtime's CUDA provider against a fake of its Python API: no GPU runs here.

The fake computes on the CPU with ONNX Runtime itself, says that it runs where it was told to, and takes inputs only
from where the real one would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lsast_engines.backends.onnxruntime import PROVIDERS, OnnxRuntimeEngine, devices
from lsast_engines.backends.registry import open_engine
from lsast_engines.errors import BackendError, UsageError


class FakeRuntime:
    """The module `onnxruntime` as its GPU wheel has it."""

    __version__ = "1.32.0"

    def __init__(self, real: Any, starts: bool = True, built_for: tuple[str, ...] = ("cuda", "cpu")) -> None:
        self.real, self.starts, self.built_for = real, starts, built_for
        self.SessionOptions = FakeOptions
        self.told: list[tuple[str, dict[str, str]]] = []
        self.uploads: list[str] = []
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=self._upload)

    def get_available_providers(self) -> list[str]:
        return [PROVIDERS[device] for device in self.built_for]

    def _upload(self, array: np.ndarray, device: str) -> Any:
        self.uploads.append(device)
        return SimpleNamespace(device=device, array=array.copy())

    def InferenceSession(self, path: Path, options: FakeOptions, **asked: Any) -> FakeSession:
        return FakeSession(self, path, options, **asked)


class FakeOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class FakeSession:
    def __init__(
        self, runtime: FakeRuntime, path: Path, options: FakeOptions, disabled_optimizers: Any, providers: Any
    ) -> None:
        self.runtime = runtime
        ((self.provider, told),) = providers
        runtime.told.append((self.provider, told))
        self.session = runtime.real.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.session.get_inputs, self.session.get_outputs

    def get_providers(self) -> list[str]:
        # As the real one: it falls back to the CPU and says nothing.
        return [self.provider, "CPUExecutionProvider"] if self.runtime.starts else ["CPUExecutionProvider"]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        assert set(binding.outputs.values()) == {"cuda"}
        binding.results = self.session.run(list(binding.outputs), binding.inputs)


class FakeBinding:
    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.outputs: dict[str, str] = {}
        self.results: list[np.ndarray] = []

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        assert value.device == "cuda", "an input that is copied at every run"
        self.inputs[name] = value.array

    def bind_output(self, name: str, device: str) -> None:
        self.outputs[name] = device

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        return self.results


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., FakeRuntime]:
    real = pytest.importorskip("onnxruntime")
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))

    def install(**options: Any) -> FakeRuntime:
        runtime = FakeRuntime(real, **options)
        monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
        return runtime

    return install


def test_devices_are_the_providers_of_the_wheel(fake: Callable[..., FakeRuntime]) -> None:
    fake()
    assert devices() == ["cpu", "cuda"]
    fake(built_for=("cpu",))
    assert devices() == ["cpu"]


def test_bind_inputs_on_cuda_uploads_once(fake: Callable[..., FakeRuntime], toy: Any) -> None:
    runtime = fake()
    engine = OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)
    feeds = toy.feeds()
    engine.bind_inputs({"x": feeds["x"], "scale": feeds["scale"]})
    for _ in range(2):
        found = engine({"timestep": feeds["timestep"]})
        for name, values in toy.expected(feeds).items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)
    assert runtime.uploads == ["cuda"] * 4  # two bound once, one at each run
    assert runtime.told == [("CUDAExecutionProvider", {"use_tf32": "0"})]


def test_cuda_provider_that_does_not_start_is_refused(fake: Callable[..., FakeRuntime], toy: Any) -> None:
    fake(starts=False)
    with pytest.raises(BackendError, match="found CPUExecutionProvider for device 'cuda'"):
        OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)


@pytest.mark.parametrize("device", ["tensorrt", "tensorrt-rtx"])
def test_open_engine_with_a_removed_device_is_refused(toy: Any, device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device} was removed: use --backend {device}$"):
        open_engine(toy.path, toy.spec, "onnxruntime", device)


@pytest.mark.gpu
def test_cuda_computes_the_graph(toy: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from lsast_engines.backends.tensorrt.cuda import gpus

    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    if not gpus() or "cuda" not in devices():
        pytest.skip(f"no NVIDIA GPU, or onnxruntime {runtime.__version__} without CUDA")
    feeds = toy.feeds()
    found = OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)(feeds)
    np.testing.assert_allclose(found["y"], toy.expected(feeds)["y"], rtol=1e-4, atol=1e-4)
