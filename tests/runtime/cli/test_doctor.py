"""The report on a machine: what it says of installations that tests can only pretend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from lsast.cli import doctor
from lsast.cli.doctor import Report, examine
from lsast.cli.main import main
from lsast_engines.errors import MissingExtraError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that pip would list; tests change it."""
    versions = dict.fromkeys(("numpy", "opencv-python-headless", "pillow", "safetensors", "onnxruntime"), "1.0")

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


def test_examine_reports_on_this_machine() -> None:
    report = examine()
    assert report.libraries["numpy"] == importlib.metadata.version("numpy")
    states = {backend.name: backend for backend in report.backends}
    assert "cpu" in states["onnxruntime"].devices
    assert states["onnxruntime"].remedy == ""
    assert report.healthy == (not report.faults)
    assert "numpy" in "\n".join(report.lines())
    assert "telemetry off" in "\n".join(report.lines())


@pytest.mark.parametrize(
    ("processor", "openvino", "auto", "faster"),
    [
        ("avx2", False, "onnxruntime in fp32 (the processor has no amx_bf16; the processor has no avx512_bf16)", ""),
        ("avx512_bf16", False, "onnxruntime in fp32 (openvino is not installed)",
         "pip install 'lsast[openvino]': openvino in bf16 is 1."),
        ("avx512_bf16", True, "openvino in bf16 (the processor has avx512_bf16: 1.", ""),
    ],
)  # fmt: skip
def test_examine_says_what_auto_takes_and_what_would_be_faster(
    monkeypatch: pytest.MonkeyPatch, processor: str, openvino: bool, auto: str, faster: str
) -> None:
    monkeypatch.setenv("LSAST_PROCESSOR", processor)
    monkeypatch.setattr("lsast_engines.backends.openvino.compute_dtypes", lambda device: ("fp32", "bf16"))
    if openvino:
        monkeypatch.setattr("lsast_engines.backends.openvino.devices", lambda: ["cpu"])
    else:
        monkeypatch.setitem(sys.modules, "openvino", None)
    report = examine()
    assert report.auto.startswith(auto)
    assert report.faster.startswith(faster)
    assert bool(report.faster) is bool(faster)
    assert f"auto      {report.auto}" in report.lines()


def test_examine_with_both_onnxruntime_wheels_reports_a_fault(installed: dict[str, str]) -> None:
    installed["onnxruntime-gpu"] = "1.31.1"
    report = examine()
    (fault,) = report.faults
    assert fault.startswith("found onnxruntime 1.0 and onnxruntime-gpu 1.31.1; expected one of them")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in fault
    assert not report.healthy
    assert f"fault: {fault}" in report.lines()


def test_examine_with_half_an_onnxruntime_reports_a_fault(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What uninstalling one of two wheels leaves: a module without anything.
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    report = examine()
    (fault,) = report.faults
    assert "cannot be imported" in fault
    states = {backend.name: backend for backend in report.backends}
    assert states["onnxruntime"].remedy.startswith("installed, and does not load (AttributeError")
    if importlib.util.find_spec("openvino") is not None:
        assert "cpu" in states["openvino"].devices


class Driver:
    """`cuda.bindings.runtime` on a machine with this answer of `cudaGetDeviceCount`."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)  # noqa: N815

    def __init__(self, code: int, count: int | None, capability: str = "8.9") -> None:
        self.cudaGetDeviceCount = lambda: (code, count)
        self.cudaGetErrorString = lambda code: (0, b"driver version is insufficient" if code == 35 else b"no device")
        major, minor = capability.split(".")
        card = SimpleNamespace(name=b"NVIDIA L4", major=int(major), minor=int(minor), totalGlobalMem=24_000_000_000)
        self.cudaGetDeviceProperties = lambda index: (0, card)


@pytest.fixture
def machine(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Examines a pretended machine: its driver (None: no cuda-bindings), and what onnxruntime-gpu says of CUDA."""

    def pretend(driver: Driver | None, cuda_fault: str | None = None, rtx: bool = True) -> Report:
        def load() -> Any:
            if driver is None:
                raise MissingExtraError("cuda-bindings", "tensorrt-rtx")
            return driver

        there = {"cuda.bindings": driver, "tensorrt_rtx": rtx or None}
        monkeypatch.setattr("lsast_engines.backends.tensorrt.cuda.load_cuda", load)
        monkeypatch.setattr("lsast_engines.backends.tensorrt.engine.importlib.util.find_spec", there.get)
        monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
        if cuda_fault is not None:
            del installed["onnxruntime"]
            installed["onnxruntime-gpu"] = "1.31.1"
            monkeypatch.setattr("lsast_engines.backends.onnxruntime.cuda_fault", lambda: cuda_fault)
            monkeypatch.setattr(doctor, "_has_cuda_provider", lambda: True)
        return examine()

    return pretend


@pytest.mark.parametrize(
    ("driver", "gpu", "rtx"),
    [
        (Driver(35, None), "none: cudaGetDeviceCount: driver version is insufficient (35); no NVIDIA driver, or", ""),
        (Driver(100, None), "none: cudaGetDeviceCount: no device (100); no NVIDIA GPU: nvidia-smi", ""),
        (Driver(0, 0), "none: CUDA lists no GPU", ""),
        (None, "none: unknown (cuda-bindings is not installed; install it with: pip install", "pip install 'lsast["),
        (Driver(0, 1), "NVIDIA L4, 8.9, 24 GB", "cuda"),
        (Driver(0, 1, "9.0"), "NVIDIA L4, 9.0, 24 GB", "found compute capability 9.0; expected 7.5, 8.6, 8.9"),
    ],
)
def test_examine_says_why_there_is_no_gpu(
    machine: Callable[..., Report], driver: Driver | None, gpu: str, rtx: str
) -> None:
    report = machine(driver)
    assert f"gpu       {gpu}" in "\n".join(report.lines())
    states = {backend.name: backend for backend in report.backends}
    found = states["tensorrt-rtx"]
    assert rtx == "cuda" if found.devices else found.remedy.startswith(rtx or report.gpu_fault)
    assert states["tensorrt"].remedy.startswith("pip install 'lsast[tensorrt]'")
    assert "driver    none (no nvidia-smi)" in report.lines()
    assert report.healthy  # it paints on the CPU, as its wheel says


@pytest.mark.parametrize("fault", ["its CUDA provider does not load (libcublas.so.13); pip install 'lsast[gpu]'", ""])
def test_examine_starts_the_cuda_that_a_gpu_wheel_names(machine: Callable[..., Report], fault: str) -> None:
    report = machine(Driver(0, 1), fault)
    (state,) = (backend for backend in report.backends if backend.name == "onnxruntime")
    assert state.devices == (("cpu",) if fault else ("cpu", "cuda"))
    assert report.faults == ((f"found onnxruntime-gpu 1.31.1, {fault}",) if fault else ())
    assert report.healthy is not bool(fault)


@pytest.mark.parametrize(
    ("status", "expected"),
    [(0, "NVIDIA 580.65.06"), (9, "nvidia-smi fails (580.65.06\n580.65.06)")],
)
def test_examine_reports_the_driver_that_its_tool_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, expected: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho 580.65.06\necho 580.65.06\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(tool))
    assert examine().driver == expected


def test_examine_with_broken_libraries_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("libcuda.so.1: version mismatch")

    monkeypatch.setattr("lsast_engines.backends.tensorrt.cuda.gpus", broken)
    monkeypatch.setattr("lsast_engines.backends.registry.backend_devices", broken)
    report = examine()
    assert report.gpus == ()
    assert not any(backend.devices for backend in report.backends)
    assert not report.healthy


@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, 1)])
def test_doctor_prints_the_report_and_exits_by_it(installed: dict[str, str], broken: bool, status: int) -> None:
    if broken:
        installed["onnxruntime-gpu"] = "1.31.1"
    result = CliRunner().invoke(main, ["--doctor", "--json"])
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["healthy"], bool(facts["faults"])) == (status, not broken, broken)
    assert "backends" in CliRunner().invoke(main, ["--doctor"]).stdout
