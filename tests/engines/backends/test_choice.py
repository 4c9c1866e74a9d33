"""What `auto` takes, by what the processor has, what is installed, and the bundle."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lsast_engines.backends.choice import INT8_MEASURED, ROWS, choose
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.environment import PROCESSOR, cpu_features
from lsast_engines.errors import BackendError, MissingExtraError, UsageError

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "speed.md"

BF16, ORT, OV = ("openvino", "bf16"), ("onnxruntime", "fp32"), ("openvino", "fp32")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends a machine: what the processor has, and what is installed."""

    def machine(processor: str, installed: str, openvino_dtypes: tuple[str, ...] = ("fp32", "bf16")) -> None:
        monkeypatch.setenv(PROCESSOR, processor)
        for name, module in (("onnxruntime", "onnxruntime"), ("openvino", "openvino")):
            if name in installed:
                monkeypatch.setattr(f"lsast_engines.backends.{module}.devices", lambda: ["cpu"])
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
        ("avx512_bf16", BOTH, "fp32", {"compute_dtype": "fp32"}, ORT),
        ("avx512_bf16", BOTH, "fp32", {"backend": "ONNXRuntime"}, ORT),
        ("avx512_bf16", BOTH, "fp32", {"backend": "openvino"}, BF16),
        ("avx512_bf16", BOTH, "fp32", {"backend": "openvino", "compute_dtype": "fp32"}, OV),
        ("avx2", BOTH, "fp32", {"backend": "openvino"}, OV),
        ("avx2", BOTH, "fp32", {"compute_dtype": "bf16", "device": "CPU"}, BF16),
    ],
)
def test_choose_takes_the_row_of_the_machine_and_the_bundle(
    pretend: Any, bundle: Bundle, processor: str, installed: str, storage_dtype: str, given: Any, expected: Any
) -> None:
    pretend(processor, installed)
    manifest = dataclasses.replace(bundle.manifest, storage_dtype=storage_dtype)
    found = choose(SimpleNamespace(manifest=manifest, path=bundle.path), **given)  # type: ignore[arg-type]
    assert (found.backend, found.compute_dtype, found.device) == (*expected, "cpu")
    assert found.reason
    assert (INT8_MEASURED in found.reason) is (storage_dtype == "int8" and expected == BF16)


def test_choose_with_a_broken_or_limited_openvino_takes_the_next_row(
    pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend("avx512_bf16", BOTH, ("fp32",))
    assert "openvino has no bf16 here" in choose().reason

    def broken() -> list[str]:
        raise BackendError("openvino is installed but cannot be imported")

    monkeypatch.setattr("lsast_engines.backends.openvino.devices", broken)
    found = choose()
    assert (found.backend, "cannot be imported" in found.reason) == ("onnxruntime", True)
    with pytest.raises(BackendError, match="cannot be imported"):
        choose(backend="openvino", compute_dtype="bf16")


def test_choose_refuses_what_is_named_and_not_there(pretend: Any) -> None:
    pretend("avx512_bf16", "")
    with pytest.raises(MissingExtraError, match=r"pip install 'lsast\[cpu\]'"):
        choose()
    pretend("avx512_bf16", "onnxruntime")
    with pytest.raises(BackendError, match=r"pip install 'lsast\[openvino\]'"):
        choose(backend="openvino")
    with pytest.raises(UsageError, match="found compute_dtype 'int3'"):
        choose(compute_dtype="int3")  # type: ignore[arg-type]


def test_guide_shows_every_row_of_the_rule() -> None:
    text = GUIDE.read_text()
    for row in ROWS:
        assert f"| `{row.backend}` | `{row.compute_dtype}` | {f'`{row.feature}`' if row.feature else 'any'} |" in text
        assert row.measured in text
    assert INT8_MEASURED in text


def test_cpu_features_are_those_of_the_system_and_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
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
