"""The report on a machine: what it says of installations that tests can only pretend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from lsast.cli import doctor
from lsast.cli.doctor import examine
from lsast.cli.main import main


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
    pytest.importorskip("onnxruntime")
    report = examine()
    assert report.libraries["numpy"] == importlib.metadata.version("numpy")
    states = {backend.name: backend for backend in report.backends}
    assert "cpu" in states["onnxruntime"].devices
    assert states["onnxruntime"].remedy == ""
    assert report.healthy == (not report.faults)
    assert "numpy" in report.text()


def test_examine_with_both_onnxruntime_wheels_reports_a_fault(installed: dict[str, str]) -> None:
    installed["onnxruntime-gpu"] = "1.31.1"
    report = examine()
    (fault,) = report.faults
    assert fault.startswith("found onnxruntime 1.0 and onnxruntime-gpu 1.31.1; expected one of them")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in fault
    assert not report.healthy
    assert f"fault: {fault}" in report.text()


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


def test_examine_without_a_gpu_says_what_each_backend_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsast_engines.backends.tensorrt.cuda.gpus", list)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr("lsast_engines.backends.tensorrt.engine.importlib.util.find_spec", lambda name: None)
    report = examine()
    states = {backend.name: backend for backend in report.backends}
    assert report.gpus == ()
    assert report.driver == "none (no nvidia-smi)"
    assert states["tensorrt"].remedy == "pip install 'lsast[tensorrt]' (needs an NVIDIA GPU)"
    assert states["tensorrt-rtx"].remedy.startswith("pip install 'lsast[tensorrt-rtx]' (compiles anywhere")
    assert "gpu       none" in report.text()


def test_examine_names_a_gpu_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA L4", capability="8.9", memory=24_000_000_000)
    monkeypatch.setattr("lsast_engines.backends.tensorrt.cuda.gpus", lambda: [card])
    assert examine().gpus == ("NVIDIA L4, 8.9, 24 GB",)


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
    pytest.importorskip("onnxruntime")
    if broken:
        installed["onnxruntime-gpu"] = "1.31.1"
    result = CliRunner().invoke(main, ["--doctor", "--json"])
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["healthy"], bool(facts["faults"])) == (status, not broken, broken)
    assert "backends" in CliRunner().invoke(main, ["--doctor"]).stdout
