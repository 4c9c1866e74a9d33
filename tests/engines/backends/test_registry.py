"""The registry: which backend and device serve a request, and what is said where none does."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from lsast_engines.backends.registry import available_backends, backend_devices, open_engine
from lsast_engines.errors import BackendError, MissingExtraError, UsageError

BACKENDS = ("openvino", "onnxruntime")


def hide(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    for library in libraries:
        monkeypatch.setitem(sys.modules, library, None)


def test_open_engine_auto_takes_the_first_installed_backend(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(available_backends()) == ["onnxruntime", "openvino"]
    assert all("cpu" in devices for devices in available_backends().values())
    assert open_engine(toy.path, toy.spec).backend == "onnxruntime"
    assert open_engine(toy.path, toy.spec, "OpenVINO", "CPU").backend == "openvino"
    hide(monkeypatch, "onnxruntime")
    assert list(available_backends()) == ["openvino"]
    assert open_engine(toy.path, toy.spec).backend == "openvino"


def test_open_engine_auto_in_bf16_skips_onnxruntime(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr("lsast_engines.backends.openvino.devices", lambda: ["cpu"])
    monkeypatch.setattr("lsast_engines.backends.openvino.OpenVinoEngine", lambda *given: opened.append(given))
    monkeypatch.setattr("lsast_engines.backends.registry.core_limit", lambda: 3)
    open_engine(toy.path, toy.spec, compute_dtype="bf16")
    open_engine(toy.path, toy.spec, compute_dtype="bf16", threads=5)
    assert opened == [(toy.path, toy.spec, "cpu", threads, "bf16") for threads in (3, 5)]
    monkeypatch.setattr("lsast_engines.backends.openvino.devices", list)
    with pytest.raises(
        BackendError, match="'auto' with device 'auto' and compute_dtype bf16; available: onnxruntime on"
    ):
        open_engine(toy.path, toy.spec, compute_dtype="bf16")


def test_open_engine_without_any_backend_names_the_extra(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openvino", "onnxruntime")
    assert available_backends() == {}
    with pytest.raises(MissingExtraError, match=r"pip install 'lsast\[cpu\]'"):
        open_engine(toy.path, toy.spec)
    with pytest.raises(MissingExtraError, match=r"openvino is not installed.*pip install 'lsast\[openvino\]'"):
        open_engine(toy.path, toy.spec, "openvino")


def test_open_engine_with_an_unavailable_choice_is_refused(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"found no backend 'tensorflow' .*available: .*onnxruntime on cpu"):
        open_engine(toy.path, toy.spec, "tensorflow")
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(BackendError, match=rf"'{backend}' with device 'tpu'; available: .*onnxruntime on cpu"):
            open_engine(toy.path, toy.spec, backend, "tpu")
    for backend in ("auto", "onnxruntime", "openvino"):
        with pytest.raises(UsageError, match=r"--compute-dtype int8 was removed: .*lsast-export quantize"):
            open_engine(toy.path, toy.spec, backend, compute_dtype="int8")  # type: ignore[arg-type]
    for threads in (0, 10**12, 1.5, 2.0, True, "2"):
        with pytest.raises(UsageError, match=f"found {threads!r} threads; expected a whole number, 1 to 4096"):
            open_engine(toy.path, toy.spec, threads=threads)  # type: ignore[arg-type]
    hide(monkeypatch, "openvino")
    with pytest.raises(
        BackendError, match=r"'openvino' .*available: onnxruntime on cpu.*pip install 'lsast\[openvino\]'"
    ):
        open_engine(toy.path, toy.spec, "openvino")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_open_engine_with_tensorrt_runs_on_cuda(toy: Any, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    opened = []
    monkeypatch.setattr("lsast_engines.backends.tensorrt.engine.devices", lambda flavor: ["cuda"])
    monkeypatch.setattr("lsast_engines.backends.tensorrt.engine.TensorRtEngine", lambda *given: opened.append(given))
    open_engine(toy.path, toy.spec, "tensorrt-rtx", device, compute_dtype="fp16")
    assert opened == [(toy.path, toy.spec, "cuda", None, "fp16", "tensorrt-rtx")]


def test_backend_devices_of_an_unknown_backend_are_not_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsast_engines.backends.tensorrt.engine.devices", lambda flavor: ["cuda"])
    assert backend_devices("tensorrt") == ["cuda"]
    with pytest.raises(KeyError, match="tensorflow"):
        backend_devices("tensorflow")
