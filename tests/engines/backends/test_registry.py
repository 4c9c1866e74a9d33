"""Which backend, device and compute dtype serve a request or are taken by `auto`, and what is said where none does."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lsast_engines.backends.choice import INT8_MEASURED, ROWS, choose
from lsast_engines.backends.registry import available_backends, backend_devices, open_engine
from lsast_engines.environment import PROCESSOR, cpu_features
from lsast_engines.errors import BackendError, MissingExtraError, UsageError


def hide(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    for library in libraries:
        monkeypatch.setitem(sys.modules, library, None)


def test_open_engine_auto_takes_the_first_installed_backend(toy, monkeypatch):
    assert list(available_backends()) == ["onnxruntime", "openvino"]
    assert all("cpu" in devices for devices in available_backends().values())
    assert open_engine(toy.path, toy.spec).backend == "onnxruntime"
    assert open_engine(toy.path, toy.spec, "OpenVINO", "CPU").backend == "openvino"
    hide(monkeypatch, "onnxruntime")
    assert list(available_backends()) == ["openvino"]
    assert open_engine(toy.path, toy.spec).backend == "openvino"


def test_open_engine_auto_in_bf16_skips_onnxruntime(toy, monkeypatch):
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


def test_open_engine_without_any_backend_names_the_extra(toy, monkeypatch):
    hide(monkeypatch, "openvino", "onnxruntime")
    assert available_backends() == {}
    with pytest.raises(MissingExtraError, match=r"pip install 'lsast\[cpu\]'"):
        choose()
    with pytest.raises(MissingExtraError, match=r"openvino is not installed.*pip install 'lsast\[openvino\]'"):
        open_engine(toy.path, toy.spec, "openvino")


def test_open_engine_with_an_unavailable_choice_is_refused(toy, monkeypatch):
    with pytest.raises(BackendError, match=r"found no backend 'tensorflow' .*available: .*onnxruntime on cpu"):
        open_engine(toy.path, toy.spec, "tensorflow")
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(BackendError, match=rf"'{backend}' with device 'tpu'; available: .*onnxruntime on cpu"):
            open_engine(toy.path, toy.spec, backend, "tpu")
    for backend in ("auto", "onnxruntime", "openvino"):
        with pytest.raises(UsageError, match=r"--compute-dtype int8 was removed: .*lsast-export quantize"):
            open_engine(toy.path, toy.spec, backend, compute_dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="found compute_dtype 'int3'"):
        choose(compute_dtype="int3")  # type: ignore[arg-type]
    hide(monkeypatch, "openvino")
    with pytest.raises(
        BackendError, match=r"'openvino' .*available: onnxruntime on cpu.*pip install 'lsast\[openvino\]'"
    ):
        open_engine(toy.path, toy.spec, "openvino")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_open_engine_with_tensorrt_runs_on_cuda(toy, monkeypatch, device):
    opened = []
    monkeypatch.setattr("lsast_engines.backends.tensorrt.engine.devices", lambda flavor: ["cuda"])
    monkeypatch.setattr("lsast_engines.backends.tensorrt.engine.TensorRtEngine", lambda *given: opened.append(given))
    open_engine(toy.path, toy.spec, "tensorrt-rtx", device, compute_dtype="fp16")
    assert opened == [(toy.path, toy.spec, "cuda", None, "fp16", "tensorrt-rtx")]
    assert backend_devices("tensorrt") == ["cuda"]
    with pytest.raises(KeyError, match="tensorflow"):  # not the devices of another
        backend_devices("tensorflow")


GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "speed.md"

BF16, ORT, OV = ("openvino", "bf16"), ("onnxruntime", "fp32"), ("openvino", "fp32")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends a machine: what the processor has, and what is installed."""

    def machine(processor: str, installed: str, openvino_dtypes: tuple[str, ...] = ("fp32", "bf16")) -> None:
        monkeypatch.setenv(PROCESSOR, processor)
        for name in ("onnxruntime", "openvino"):
            if name in installed:
                monkeypatch.setattr(f"lsast_engines.backends.{name}.devices", lambda: ["cpu"])
            else:
                monkeypatch.setitem(sys.modules, name, None)
        if "openvino" in installed:
            monkeypatch.setattr("lsast_engines.backends.openvino.compute_dtypes", lambda device: openvino_dtypes)

    return machine


BOTH = "onnxruntime openvino"


@pytest.mark.parametrize(
    ("processor", "installed", "storage_dtype", "given", "expected"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16", BOTH, "fp32", {}, BF16),
        ("avx2 avx512f avx512_bf16", BOTH, "bf16", {}, BF16),
        ("avx2 avx512f avx512_vnni", BOTH, "fp32", {}, ORT),  # emulates bf16
        ("avx2", BOTH, "fp16", {}, ORT),
        ("asimd bf16 i8mm", BOTH, "fp32", {}, ORT),
        ("", BOTH, "fp32", {}, ORT),
        ("avx512_bf16", "onnxruntime", "fp32", {}, ORT),
        ("avx512_bf16", "openvino", "fp32", {}, BF16),
        ("avx2", "openvino", "fp32", {}, OV),
        ("avx512_bf16 amx_int8", BOTH, "int8", {}, BF16),
        ("avx512_vnni amx_int8", BOTH, "int8", {}, ORT),
        ("avx512_bf16", BOTH, "int8", {"backend": "onnxruntime"}, ORT),
        ("avx2", BOTH, "int8", {"backend": "openvino"}, OV),
        ("avx2 avx_vnni", BOTH, "int8", {"backend": "openvino"}, OV),
        ("avx512_bf16", BOTH, "fp32", {"compute_dtype": "fp32"}, ORT),
        ("avx512_bf16", BOTH, "fp32", {"backend": "ONNXRuntime"}, ORT),
        ("avx512_bf16", BOTH, "fp32", {"backend": "openvino"}, BF16),
        ("avx512_bf16", BOTH, "fp32", {"backend": "openvino", "compute_dtype": "fp32"}, OV),
        ("avx2", BOTH, "fp32", {"backend": "openvino"}, OV),
        ("avx2", BOTH, "fp32", {"compute_dtype": "bf16", "device": "CPU"}, BF16),
    ],
)
def test_choose_takes_the_row_of_the_machine_and_the_bundle(
    pretend, bundle, processor, installed, storage_dtype, given, expected, caplog
):
    pretend(processor, installed)
    manifest = dataclasses.replace(bundle.manifest, storage_dtype=storage_dtype)
    found = choose(SimpleNamespace(manifest=manifest, path=bundle.path), **given)  # type: ignore[arg-type]
    assert (found.backend, found.compute_dtype, found.device) == (*expected, "cpu")
    assert found.reason
    assert (INT8_MEASURED in found.reason) is (storage_dtype == "int8" and expected == BF16)
    overflows = (processor, storage_dtype, expected) == ("avx2", "int8", OV)
    assert ("8-bit products overflow" in caplog.text) is overflows


def test_choose_with_a_broken_or_limited_openvino_takes_the_next_row(pretend, monkeypatch):
    pretend("avx512_bf16", BOTH, ("fp32",))
    assert "openvino has no bf16 here" in choose().reason

    def broken() -> list[str]:
        raise BackendError("openvino is installed but cannot be imported")

    monkeypatch.setattr("lsast_engines.backends.openvino.devices", broken)
    found = choose()
    assert (found.backend, "cannot be imported" in found.reason) == ("onnxruntime", True)
    with pytest.raises(BackendError, match="cannot be imported"):
        choose(backend="openvino", compute_dtype="bf16")


def test_guide_shows_every_row_of_the_rule():
    text = GUIDE.read_text()
    for row in ROWS:
        assert f"| `{row.backend}` | `{row.compute_dtype}` | {f'`{row.feature}`' if row.feature else 'any'} |" in text
        assert row.measured in text
    assert INT8_MEASURED in text


def test_cpu_features_are_those_of_the_system_and_of_the_variable(monkeypatch):
    monkeypatch.setenv(PROCESSOR, "avx2, amx_bf16")
    assert cpu_features() == {"avx2", "amx_bf16"}
    monkeypatch.delenv(PROCESSOR)
    facts = {"model name": "some", "flags": "sse avx512_bf16"}
    monkeypatch.setattr("lsast_engines.environment.cpu_facts", lambda: facts)
    assert cpu_features() == {"sse", "avx512_bf16"}
    monkeypatch.setattr("lsast_engines.environment.cpu_facts", lambda: {"Features": "asimd bf16"})
    assert cpu_features() == {"asimd", "bf16"}
    monkeypatch.setattr("lsast_engines.environment.cpu_facts", dict)  # another system than Linux
    umath = "numpy._core._multiarray_umath"
    pytest.importorskip(umath)
    monkeypatch.setattr(f"{umath}.__cpu_features__", {"AVX2": True, "AVX512_SPR": True, "ASIMD": False})
    assert cpu_features() == {"avx512_bf16"}
    monkeypatch.setitem(sys.modules, umath, SimpleNamespace())
    assert cpu_features() == frozenset()
