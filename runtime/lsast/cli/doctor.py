"""What of lsast works on this machine, and what to install for the rest: the report of `lsast-run --doctor`.

Everything is looked up, nothing is loaded that could fail the process: a report must come out of a broken installation,
too. A backend "works" here if its library is installed and finds the device; whether a graph runs on it, a picture
tells.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from dataclasses import dataclass, field

from lsast_engines.environment import installed_versions

LIBRARIES = (
    ("numpy", None),
    ("opencv-python-headless", None),
    ("pillow", None),
    ("safetensors", None),
    ("onnxruntime", "cpu"),
    ("onnxruntime-gpu", "gpu"),
    ("openvino", "openvino"),
    ("tensorrt", "tensorrt"),
    ("tensorrt-rtx", "tensorrt-rtx"),
    ("cuda-python", "tensorrt-rtx"),
)
"""Distributions that the runtime uses, each with the extra that installs it."""

_NEEDS = {"tensorrt-rtx": " (compiles anywhere, runs on an NVIDIA GPU)", "tensorrt": " (needs an NVIDIA GPU)"}

WHEELS = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that write into one folder: of two, whichever came last is half of each."""


@dataclass(frozen=True)
class BackendState:
    """Whether a backend can be used."""

    name: str
    devices: tuple[str, ...]
    """What it finds here; empty if it cannot be used."""
    remedy: str
    """What helps; empty if it works."""


@dataclass(frozen=True)
class Report:
    """What `examine` found."""

    system: str
    gpus: tuple[str, ...]
    """Name, compute capability and memory of each; empty without a driver."""
    driver: str
    """What is known of the NVIDIA driver, or why nothing is."""
    libraries: dict[str, str | None]
    """Version by distribution; None if it is not installed."""
    backends: tuple[BackendState, ...]
    faults: tuple[str, ...] = field(default=())
    """What is wrong whatever one wants to run, each with what mends it."""

    @property
    def healthy(self) -> bool:
        """Whether some backend works and nothing is broken."""
        return not self.faults and any(backend.devices for backend in self.backends)

    def text(self) -> str:
        """The report for a terminal."""
        width = max(map(len, self.libraries))
        lines = [f"system    {self.system}", f"driver    {self.driver}"]
        lines += [f"gpu       {gpu}" for gpu in self.gpus] or ["gpu       none"]
        lines += ["", "libraries"]
        lines += [f"  {name:<{width}}  {version or '-'}" for name, version in self.libraries.items()]
        lines += ["", "backends"]
        for backend in self.backends:
            lines.append(f"  {backend.name:<{width}}  {', '.join(backend.devices) or backend.remedy}")
        lines += ["", *(f"fault: {fault}" for fault in self.faults)] if self.faults else []
        return "\n".join(lines)


def examine() -> Report:
    """Look at this machine and this environment."""
    names = [name for name, _ in LIBRARIES]
    libraries: dict[str, str | None] = {**dict.fromkeys(names), **installed_versions(*names)}
    gpus, driver = _gpus(), _driver()
    return Report(
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        gpus=gpus,
        driver=driver,
        libraries=libraries,
        backends=tuple(_backends(bool(gpus))),
        faults=tuple(_faults(libraries)),
    )


def _faults(libraries: dict[str, str | None]) -> list[str]:
    faults = []
    if all(libraries[wheel] for wheel in WHEELS):
        both = " and ".join(f"{wheel} {libraries[wheel]}" for wheel in WHEELS)
        faults.append(
            f"found {both}; expected one of them, they overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'lsast[cpu]' or 'lsast[gpu]'"
        )
    elif any(libraries[wheel] for wheel in WHEELS) and not _loads("onnxruntime"):
        faults.append(
            "found an onnxruntime that cannot be imported; expected a whole one: "
            "pip install --force-reinstall --no-deps onnxruntime (or onnxruntime-gpu)"
        )
    return faults


def _loads(module: str) -> bool:
    """Whether `module` imports and is more than the empty folder that an uninstalled half leaves."""
    try:
        return hasattr(importlib.import_module(module), "__version__")
    except Exception:  # a broken library may raise anything, and the report goes on
        return False


def _backends(gpu: bool) -> list[BackendState]:
    from lsast_engines.backends.registry import EXTRAS, backend_devices

    states = []
    for name, extra in EXTRAS.items():
        remedy = ""
        devices: list[str] = []
        try:
            devices = backend_devices(name)
        except ImportError:
            remedy = f"pip install 'lsast[{extra}]'{'' if gpu else _NEEDS.get(name, '')}"
        except Exception as error:  # one broken library must not hide the others
            remedy = f"installed, and does not load ({type(error).__name__}: {error})"
        if not devices and not remedy:
            remedy = "installed, and finds no NVIDIA GPU with a driver"
        states.append(BackendState(name, tuple(devices), remedy))
    return states


def _gpus() -> tuple[str, ...]:
    from lsast_engines.backends.tensorrt.cuda import gpus

    try:
        found = gpus()
    except Exception:  # cuda-python is missing, which the list of libraries says, or broken: the report goes on
        return ()
    return tuple(f"{gpu.name}, {gpu.capability}, {gpu.memory / 1e9:.0f} GB" for gpu in found)


def _driver() -> str:
    """The NVIDIA driver by its own tool, which needs none of our libraries."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none (no nvidia-smi)"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({error})"
    lines = said.stdout.split("\n")
    return f"NVIDIA {lines[0].strip()}" if said.returncode == 0 else f"nvidia-smi fails ({said.stdout.strip()})"
