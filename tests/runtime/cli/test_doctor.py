"""The report on a machine: what it says of installations that tests can only pretend."""

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from fake_gpu import FakeCuda, Status
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


def test_doctor_reports_on_this_machine(installed):
    result = CliRunner().invoke(main, ["--doctor", "--json"])
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["healthy"], facts["faults"]) == (0, True, [])
    assert facts["libraries"]["numpy"] == "1.0"
    states = {backend["name"]: backend for backend in facts["backends"]}
    assert ("cpu" in states["onnxruntime"]["devices"], states["onnxruntime"]["remedy"]) == (True, "")
    text = CliRunner().invoke(main, ["--doctor"]).stdout
    assert all(words in text for words in ("numpy", "backends", "telemetry off"))


def test_doctor_with_both_onnxruntime_wheels_reports_a_fault(installed):
    installed["onnxruntime-gpu"] = "1.31.1"
    result = CliRunner().invoke(main, ["--doctor"])
    fault = "fault: found onnxruntime 1.0 and onnxruntime-gpu 1.31.1; expected one of them"
    assert (result.exit_code, fault in result.stdout) == (1, True)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in result.stdout


def test_examine_says_what_auto_takes_and_what_would_be_faster(monkeypatch):
    monkeypatch.setenv("LSAST_PROCESSOR", "avx512_bf16")
    monkeypatch.setitem(sys.modules, "openvino", None)
    report = examine()
    assert report.auto == "onnxruntime in fp32 (openvino is not installed)"
    assert report.faster.startswith("pip install 'lsast[openvino]': openvino in bf16 is 1.")
    assert {f"auto      {report.auto}", f"faster    {report.faster}"} <= {*report.lines()}
    monkeypatch.setenv("LSAST_PROCESSOR", "avx2")
    assert examine().faster == ""


def test_examine_with_half_an_onnxruntime_reports_a_fault(installed, monkeypatch):
    # What uninstalling one of two wheels leaves: a module without anything.
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    report = examine()
    (fault,) = report.faults
    assert "does not load (AttributeError" in fault
    states = {backend.name: backend for backend in report.backends}
    assert states["onnxruntime"].remedy.startswith("installed, and does not load (AttributeError")
    if importlib.util.find_spec("openvino") is not None:
        assert "cpu" in states["openvino"].devices


@pytest.fixture
def machine(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Examines a pretended machine: its driver (None: no cuda-bindings), and what onnxruntime-gpu says of CUDA."""

    def pretend(driver: FakeCuda | None, cuda_fault: str | None = None, rtx: bool = True) -> Report:
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
            monkeypatch.setattr("lsast_engines.backends.onnxruntime.gpu_fault", lambda: cuda_fault)
            monkeypatch.setattr(doctor, "_has_cuda_provider", lambda: True)
        return examine()

    return pretend


@pytest.mark.parametrize(
    ("driver", "gpu", "rtx"),
    [
        (FakeCuda(driver=Status.cudaErrorInsufficientDriver), "none: cudaGetDeviceCount: cudaErrorInsufficientDriver "
         "(35); no NVIDIA driver, or", ""),
        (FakeCuda(driver=Status.cudaErrorNoDevice), "none: cudaGetDeviceCount: cudaErrorNoDevice (100); no NVIDIA GPU: "
         "nvidia-smi", ""),
        (FakeCuda(count=0), "none: CUDA lists no GPU", ""),
        (None, "none: unknown (cuda-bindings is not installed; install it with: pip install", "pip install 'lsast["),
        (FakeCuda(), "Fake GPU, 8.9, 1 GB", "cuda"),
        (FakeCuda((9, 0)), "Fake GPU, 9.0, 1 GB", "found compute capability 9.0; expected 7.5, 8.6, 8.9"),
    ],
)  # fmt: skip
def test_examine_says_why_there_is_no_gpu(machine, driver, gpu, rtx):
    report = machine(driver)
    assert f"gpu       {gpu}" in "\n".join(report.lines())
    states = {backend.name: backend for backend in report.backends}
    found = states["tensorrt-rtx"]
    assert rtx == "cuda" if found.devices else found.remedy.startswith(rtx or report.gpu_fault)
    assert states["tensorrt"].remedy.startswith("pip install 'lsast[tensorrt]'")
    assert "driver    none (no nvidia-smi)" in report.lines()
    assert report.healthy  # it paints on the CPU, as its wheel says


@pytest.mark.parametrize("fault", ["its CUDA provider does not load (libcublas.so.13); pip install 'lsast[gpu]'", ""])
def test_examine_starts_the_cuda_that_a_gpu_wheel_names(machine, fault):
    report = machine(FakeCuda(), fault)
    (state,) = (backend for backend in report.backends if backend.name == "onnxruntime")
    assert state.devices == (("cpu",) if fault else ("cpu", "cuda"))
    assert report.faults == ((f"found onnxruntime-gpu 1.31.1, {fault}",) if fault else ())
    assert report.healthy is not bool(fault)


@pytest.mark.parametrize(
    ("status", "expected"), [(0, "NVIDIA 580.65.06"), (9, "nvidia-smi fails (580.65.06\n580.65.06)")]
)
def test_examine_reports_the_driver_that_its_tool_prints(monkeypatch, tmp_path, status, expected):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho 580.65.06\necho 580.65.06\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(tool))
    assert examine().driver == expected


def test_examine_with_broken_libraries_still_reports(monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("libcuda.so.1: version mismatch")

    monkeypatch.setattr("lsast_engines.backends.tensorrt.cuda.gpus", broken)
    monkeypatch.setattr("lsast_engines.backends.registry.backend_devices", broken)
    report = examine()
    assert report.gpus == ()
    assert not any(backend.devices for backend in report.backends)
    assert not report.healthy
