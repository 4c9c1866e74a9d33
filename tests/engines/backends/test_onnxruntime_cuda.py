"""ONNX Runtime's CUDA provider where no GPU is: what is opened for "cuda" are real sessions and bindings on the CPU."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lsast_engines.backends import onnxruntime
from lsast_engines.backends.base import Engine
from lsast_engines.backends.onnxruntime import GPU_SUFFIX, KEPT_SESSIONS, OnnxRuntimeEngine, devices, gpu_fault
from lsast_engines.backends.registry import open_engine
from lsast_engines.errors import BackendError, UsageError

library = pytest.importorskip("onnxruntime")

CUDA = onnxruntime.PROVIDERS["cuda"]
MISSING = "Failed to load libcublas.so.13: cannot open shared object file\nPlease follow https://onnxruntime.ai"
OLD_DRIVER = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW> CUDA failure 35: CUDA "
    "driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=vm ; line=160"
)


@pytest.mark.parametrize(
    ("provider", "loads", "fault", "words"),
    [
        (CUDA, True, "", ""),
        ("AzureExecutionProvider", True, "", "the installed onnxruntime was built without CUDA"),
        (CUDA, False, MISSING, r"load \(Failed to load libcublas.so.13: .*: pip install .lsast\[gpu\]"),
        (CUDA, False, "", r"does not load \(.*libonnxruntime_providers_cuda.so"),
        (CUDA, True, OLD_DRIVER, r"start \(CUDA failure 35: .* is insufficient for CUDA runtime version\); install or"),
        (CUDA, True, "no device", r"does not start \(no device\)"),
    ],
)
def test_cuda_that_does_not_start_says_why(toy, tmp_path, monkeypatch, capsys, provider, loads, fault, words):
    def start(*_: Any) -> None:
        if fault:
            raise RuntimeError(fault)

    wheel = SimpleNamespace(
        __file__=str(tmp_path / "__init__.py"),
        get_available_providers=lambda: [provider, "CPUExecutionProvider"],
        preload_dlls=lambda: print(fault) if fault == MISSING else None,  # noqa: T201 - as the real one, on stdout
        OrtValue=SimpleNamespace(ortvalue_from_numpy=start),
    )
    monkeypatch.setattr(onnxruntime, "import_library", lambda name: wheel)
    if loads:
        monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    assert list(devices()) == (["cpu"] if words else ["cpu", "cuda"])
    if words:
        with pytest.raises(BackendError, match=rf"device 'cuda'; available: .*; onnxruntime: .*{words}"):
            open_engine(toy.path, toy.spec, "onnxruntime", "cuda")
        with pytest.raises(BackendError, match=f"onnxruntime cannot use device 'cuda': .*{words}"):
            OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(onnxruntime, "gpu_fault", lambda: pytest.fail("CUDA was started"))
    assert "cpu" in devices()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Pretends a card: the `opened` sessions by the lengths of their axes, and the bytes of each of the `uploads`."""
    seen = SimpleNamespace(opened=[], uploads=[])
    value = library.OrtValue
    opening, allocate, update = OnnxRuntimeEngine._open, value.ortvalue_from_shape_and_type, value.update_inplace
    monkeypatch.setitem(onnxruntime.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(onnxruntime, "_CUDA_OPTIONS", {})
    monkeypatch.setattr(onnxruntime, "gpu_fault", lambda: "")
    monkeypatch.setattr(
        OnnxRuntimeEngine, "_open", lambda self, lengths: seen.opened.append(lengths) or opening(self, lengths)
    )
    monkeypatch.setattr(
        value, "ortvalue_from_shape_and_type", staticmethod(lambda shape, dtype, *_: allocate(shape, dtype, "cpu", 0))
    )
    monkeypatch.setattr(
        value, "update_inplace", lambda self, array: seen.uploads.append(array.nbytes) or update(self, array)
    )
    return seen


def expect(engine: Engine, toy: Any, feeds: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> None:
    found = engine(given)
    for name, values in toy.expected(feeds).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)


def test_engine_on_cuda_keeps_a_session_for_each_size(card, toy):
    engine = OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)
    assert card.opened == []
    for length in (5, 6, 5, 7, 5, 6):  # 7 takes the place of 6, then 6 that of 7
        feeds = toy.feeds(length=length)
        expect(engine, toy, feeds, feeds)
    assert [lengths["N"] for lengths in card.opened] == [5, 6, 7, 6]
    assert card.opened[0] == {"B": 2, "N": 5}
    assert len(engine._kept) == KEPT_SESSIONS
    engine.close()


def test_bind_inputs_on_cuda_uploads_once_for_each_session(card, toy):
    engine = OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)
    first, other = toy.feeds(), toy.feeds(seed=1)
    engine.bind_inputs({"x": first["x"], "scale": first["scale"]})
    for timestep in (first["timestep"], other["timestep"]):
        expect(engine, toy, {**first, "timestep": timestep}, {"timestep": timestep})
    engine.bind_inputs({"scale": other["scale"]})
    expect(engine, toy, {**first, "scale": other["scale"]}, {"timestep": first["timestep"]})
    assert card.uploads == [first["x"].nbytes, 4, 16, 16, 4, 16]


def test_engine_writes_its_outputs_to_the_same_memory(toy):
    """On the CPU, by the same binding as on a GPU, where addresses are part of a CUDA graph."""
    engine = OnnxRuntimeEngine(toy.path, toy.spec, "cpu", None)
    first = engine(toy.feeds())
    kept = {name: value.copy() for name, value in first.items()}
    again = engine(toy.feeds(seed=1))
    assert all(np.shares_memory(first[name], again[name]) for name in first)
    engine.release_memory()
    released = engine(toy.feeds())
    assert not any(np.shares_memory(again[name], released[name]) for name in first)
    engine.close()
    assert all(np.array_equal(kept[name], value) for name, value in released.items())  # still there


def test_compute_dtype_is_fp16_on_a_gpu_unless_chosen(card, toy):
    assert open_engine(toy.path, toy.spec).compute_dtype == "fp32"
    graph = toy.path.with_name(f"toy{GPU_SUFFIX}")
    with pytest.raises(BackendError, match=f"found no graph for GPUs .*{graph.name}; export the bundle again"):
        open_engine(toy.path, toy.spec, device="cuda")
    graph.write_bytes(toy.path.read_bytes())
    assert open_engine(toy.path, toy.spec, device="cuda").compute_dtype == "fp16"
    assert open_engine(toy.path, toy.spec, device="cuda", compute_dtype="fp32").compute_dtype == "fp32"
    for device, dtype, found in (("cpu", "fp16", "fp32 on cpu"), ("cuda", "bf16", "fp16 or fp32 on cuda")):
        with pytest.raises(BackendError, match=f"onnxruntime computes in {found}"):
            open_engine(toy.path, toy.spec, "onnxruntime", device, compute_dtype=dtype)  # type: ignore[arg-type]
    for removed in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(UsageError, match=f"--device {removed} was removed: use --backend {removed}$"):
            open_engine(toy.path, toy.spec, "onnxruntime", removed)


@pytest.mark.gpu
def test_cuda_computes_the_graph(toy):
    if fault := gpu_fault():
        pytest.skip(f"onnxruntime: {fault}")
    engine = OnnxRuntimeEngine(toy.path, toy.spec, "cuda", None)
    for seed in range(4):  # the first run is captured, the others are its replays
        feeds = toy.feeds(seed=seed)
        expect(engine, toy, feeds, feeds)
