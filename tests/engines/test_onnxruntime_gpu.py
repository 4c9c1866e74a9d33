# ruff: noqa: N802 - the fakes have the names of what they stand for
"""ONNX Runtime's GPU providers against a fake of its Python API: no GPU runs here.

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

from lsast_engines import onnxruntime_gpu
from lsast_engines.bundle import EMBEDDED, Bundle
from lsast_engines.errors import BackendError
from lsast_engines.onnxruntime import OnnxRuntimeEngine, devices
from lsast_engines.onnxruntime_gpu import PROVIDERS, cache_folder, provider_options
from lsast_engines.profile import Ranges


class FakeRuntime:
    """The module `onnxruntime` as its GPU wheel has it, or its CPU wheel with the plugin."""

    __version__ = "1.32.0"

    def __init__(
        self, real: Any, starts: bool = True, built_for: tuple[str, ...] = ("tensorrt", "cuda", "cpu")
    ) -> None:
        self.real, self.starts, self.built_for = real, starts, built_for
        self.SessionOptions = FakeOptions
        self.told: list[tuple[str, dict[str, str]]] = []
        self.uploads: list[str] = []
        self.plugins: dict[str, str] = {}
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=self._upload)

    def get_available_providers(self) -> list[str]:
        return [PROVIDERS[device] for device in self.built_for]

    def _upload(self, array: np.ndarray, device: str) -> Any:
        self.uploads.append(device)
        return SimpleNamespace(device=device, array=array.copy())

    def register_execution_provider_library(self, name: str, path: str) -> None:
        assert name not in self.plugins, "registering twice is an error of ONNX Runtime"
        self.plugins[name] = path

    def get_ep_devices(self) -> list[Any]:
        return [SimpleNamespace(ep_name=name) for name in ("CPUExecutionProvider", *self.plugins)]

    def InferenceSession(self, path: Path, options: FakeOptions, **asked: Any) -> FakeSession:
        return FakeSession(self, path, options, **asked)


class FakeOptions:
    def __init__(self) -> None:
        self.added: list[Any] = []
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def add_provider_for_devices(self, devices: list[Any], told: dict[str, str]) -> None:
        self.added.append((devices[0].ep_name, told))


class FakeSession:
    def __init__(
        self, runtime: FakeRuntime, path: Path, options: FakeOptions, disabled_optimizers: Any, providers: Any = None
    ) -> None:
        self.runtime = runtime
        ((self.provider, told),) = providers or options.added
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


def test_a_device_is_a_provider_that_the_wheel_has(
    fake: Callable[..., FakeRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_gpu.importlib.util, "find_spec", lambda name: None)
    fake()
    assert devices() == ["cpu", "cuda", "tensorrt"]
    fake(built_for=("cpu",))
    assert devices() == ["cpu"]
    monkeypatch.setattr(onnxruntime_gpu.importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert devices() == ["cpu", "tensorrt-rtx"]


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_what_is_bound_lies_on_the_device(
    fake: Callable[..., FakeRuntime], toy: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = SimpleNamespace(get_library_path=lambda: "plugin.so")
    monkeypatch.setitem(sys.modules, onnxruntime_gpu.PLUGIN, plugin)
    monkeypatch.setattr(onnxruntime_gpu, "Ranges", ToyRanges)
    runtime = fake()
    engine = OnnxRuntimeEngine(toy.path, toy.spec, device, None)
    feeds = toy.feeds()
    engine.bind({"x": feeds["x"], "scale": feeds["scale"]})
    for _ in range(2):
        found = engine({"timestep": feeds["timestep"]})
        for name, values in toy.expected(feeds).items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)
    assert runtime.uploads == ["cuda"] * 4  # two bound once, one at each run
    assert runtime.told[0][0] == PROVIDERS[device]
    assert runtime.plugins == ({PROVIDERS[device]: "plugin.so"} if device == "tensorrt-rtx" else {})
    OnnxRuntimeEngine(toy.path, toy.spec, device, None)  # the plugin is registered once


class ToyRanges:
    """The toy graph has axes of its own."""

    def profile(self, spec: Any) -> dict[str, Any]:
        return {"x": ((1, 3, 1), (2, 3, 5), (4, 3, 9)), "scale": ((), (), ())}


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_provider_that_does_not_start_is_an_error(
    fake: Callable[..., FakeRuntime], toy: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_gpu, "Ranges", ToyRanges)
    fake(starts=False)
    with pytest.raises(BackendError, match=f"found CPUExecutionProvider for device '{device}'"):
        OnnxRuntimeEngine(toy.path, toy.spec, device, None)


def test_tensorrt_is_told_of_sizes_and_caches(fake: Callable[..., FakeRuntime]) -> None:
    runtime = fake()
    spec = Bundle.open(EMBEDDED, verify_hashes=False).manifest.graphs["denoiser"]
    told = provider_options(runtime, EMBEDDED / "denoiser.onnx", spec, "tensorrt")
    assert told["trt_profile_min_shapes"].startswith("latent:1x4x48x48,hint:1x64x48x48,timestep:1,kv_unet:1x1x8x3328")
    assert "latent:4x4x128x128" in told["trt_profile_max_shapes"]
    assert "control_scale" not in told["trt_profile_opt_shapes"]
    assert told["trt_engine_cache_enable"] == told["trt_timing_cache_enable"] == "1"
    assert Path(told["trt_engine_cache_path"]).is_dir()
    rtx = provider_options(runtime, EMBEDDED / "denoiser.onnx", spec, "tensorrt-rtx")
    assert Path(rtx["nv_runtime_cache_path"]).is_dir()
    assert rtx["nv_runtime_cache_path"] != told["trt_engine_cache_path"]
    assert rtx["nv_profile_max_shapes"] == told["trt_profile_max_shapes"]


def test_caches_are_of_one_graph_version_device_and_profile(fake: Callable[..., FakeRuntime], toy: Any) -> None:
    fake()
    profile = ToyRanges().profile(None)
    wide = {**profile, "x": ((1, 3, 1), (2, 3, 5), (8, 3, 9))}
    folders = [
        cache_folder("1.32.0", toy.path, profile, "tensorrt"),
        cache_folder("1.32.1", toy.path, profile, "tensorrt"),
        cache_folder("1.32.0", toy.path, profile, "tensorrt-rtx"),
        cache_folder("1.32.0", toy.path, wide, "tensorrt"),
    ]
    (toy.path.parent / "toy.data").write_bytes(b"other weights")
    folders.append(cache_folder("1.32.0", toy.path, profile, "tensorrt"))
    assert len(set(folders)) == 5
    assert cache_folder("1.32.0", toy.path, profile, "tensorrt") == folders[-1]


def test_the_default_ranges_are_those_of_compiled_engines() -> None:
    assert onnxruntime_gpu.Ranges is Ranges


@pytest.mark.gpu
def test_the_gpu_computes_what_the_cpu_computes(toy: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from lsast_engines.cuda import gpus

    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    if not gpus() or "cuda" not in devices():
        pytest.skip(f"no NVIDIA GPU, or onnxruntime {runtime.__version__} without CUDA")
    feeds = toy.feeds()
    found = OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)(feeds)
    np.testing.assert_allclose(found["y"], toy.expected(feeds)["y"], rtol=1e-4, atol=1e-4)
