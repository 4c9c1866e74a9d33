"""What of lsast works on this machine, and what to install for the rest: the report of `lsast doctor`.

A broken installation must still get its report, so that every look-up catches what it may raise. A backend "works" here
if its library is installed and finds the device; no graph is run.
"""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

from lsast_engines.backends.base import import_library
from lsast_engines.environment import installed_versions
from lsast_engines.errors import install_command

LIBRARIES = (
    "numpy", "opencv-python-headless", "pillow", "safetensors", "onnxruntime", "onnxruntime-gpu", "openvino",
    "tensorrt", "tensorrt-rtx", "cuda-bindings", "cuda-python",
)  # fmt: skip

_GPU_NOTES = {"tensorrt-rtx": " (compiles anywhere, runs on an NVIDIA GPU)", "tensorrt": " (needs an NVIDIA GPU)"}

WHEELS = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that install into the same folder: with both, the files of one replace some of the other's."""


@dataclass(frozen=True)
class BackendState:
    """The devices that a backend can use here, and why it lacks some or all, and what helps; empty if it works."""

    name: str
    devices: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class Report:
    """What `examine` found."""

    system: str
    gpus: tuple[str, ...]
    """Name, compute capability and memory of each NVIDIA GPU."""
    gpu_fault: str
    """Why there is none, with the code of CUDA and what helps; empty if there is one."""
    driver: str
    libraries: dict[str, str | None]
    backends: tuple[BackendState, ...]
    auto: str
    faster: str
    """What to install to paint faster on this processor, and how fast; empty if nothing is known."""
    telemetry: str
    faults: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether some backend works and nothing is broken."""
        return not self.faults and any(backend.devices for backend in self.backends)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        width = max(map(len, self.libraries))
        lines = [f"system    {self.system}", f"auto      {self.auto}"]
        lines += [f"faster    {self.faster}"] if self.faster else []
        lines += [f"driver    {self.driver}"]
        lines += [f"gpu       {gpu}" for gpu in self.gpus or (f"none: {self.gpu_fault}",)]
        lines += [f"telemetry {self.telemetry}"]
        lines += ["", "libraries"]
        lines += [f"  {name:<{width}}  {version or '-'}" for name, version in self.libraries.items()]
        lines += ["", "backends"]
        for state in self.backends:
            lines += [f"  {state.name:<{width}}  {'; '.join(filter(None, (', '.join(state.devices), state.remedy)))}"]
        lines += ["", *(f"fault: {fault}" for fault in self.faults)] if self.faults else []
        return lines


def examine() -> Report:
    """Examine this machine and this environment."""
    from lsast_engines.backends.choice import choose

    libraries: dict[str, str | None] = {**dict.fromkeys(LIBRARIES), **installed_versions(*LIBRARIES)}
    gpus, gpu_fault = _gpus()
    backends = _backends(bool(gpus))
    try:
        choice = choose()
        auto, faster = f"{choice.backend} in {choice.compute_dtype} ({choice.reason})", choice.remedy
    except Exception as error:  # nothing is installed, or a library is broken
        auto, faster = f"nothing: {error}", ""
    telemetry = "off (that of ONNX Runtime and of OpenVINO)"
    if (value := os.environ.get("ORT_DISABLE_TELEMETRY", "1")) != "1":  # see `lsast_engines.backends.base`
        telemetry = f"OpenVINO's is off; ONNX Runtime's is left to ORT_DISABLE_TELEMETRY={value}"
    return Report(
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        gpus=gpus,
        gpu_fault=gpu_fault,
        driver=_driver(),
        libraries=libraries,
        backends=tuple(backends),
        auto=auto,
        faster=faster,
        telemetry=telemetry,
        faults=tuple(_faults(libraries, backends)),
    )


def _faults(libraries: dict[str, str | None], backends: list[BackendState]) -> list[str]:
    found = [f"{wheel} {libraries[wheel]}" for wheel in WHEELS if libraries[wheel]]
    if len(found) == len(WHEELS):
        return [
            f"found {' and '.join(found)}; expected one of them, they overwrite each other: "
            f"pip uninstall -y onnxruntime onnxruntime-gpu, then {install_command('cpu')} or {install_command('gpu')}"
        ]
    (state,) = (state for state in backends if state.name == "onnxruntime")
    if found and not state.devices:
        return [
            f"found {found[0]}, {state.remedy}; expected a whole one: "
            "pip install --force-reinstall --no-deps onnxruntime (or onnxruntime-gpu)"
        ]
    lacks_cuda = libraries["onnxruntime-gpu"] and "cuda" not in state.devices
    return [f"found {found[0]}, {state.remedy}"] if lacks_cuda else []


def _backends(has_gpu: bool) -> list[BackendState]:
    from lsast_engines.backends.registry import EXTRAS, backend_devices, gpu_fault

    states = []
    for name, extra in EXTRAS.items():
        devices: list[str] = []
        try:
            devices = backend_devices(name)
            built_for_gpus = name != "onnxruntime" or _has_cuda_provider()
            remedy = gpu_fault(name) if built_for_gpus else ""
        except ImportError:
            remedy = install_command(extra) + ("" if has_gpu else _GPU_NOTES.get(name, ""))
        except Exception as error:  # one broken library must not hide the others
            remedy = f"installed, and does not load ({type(error).__name__}: {error})"
        states.append(BackendState(name, tuple(devices), remedy))
    return states


def _has_cuda_provider() -> bool:
    return "CUDAExecutionProvider" in import_library("onnxruntime").get_available_providers()


def _gpus() -> tuple[tuple[str, ...], str]:
    """The GPUs, and why there is none."""
    from lsast_engines.backends.tensorrt.cuda import gpu_fault, gpus

    try:
        found, fault = gpus(), gpu_fault()
    except Exception as error:  # cuda-bindings is missing, or broken
        return (), f"unknown ({error})"
    return tuple(f"{gpu.name}, {gpu.capability}, {gpu.memory / 1e9:.0f} GB" for gpu in found), fault


def _driver() -> str:
    """The NVIDIA driver by its own tool, which needs none of our libraries."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none (no nvidia-smi)"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({error})"
    text = ran.stdout.strip()
    return f"NVIDIA {text.partition(chr(10))[0]}" if ran.returncode == 0 else f"nvidia-smi fails ({text})"
