"""What a figure was measured on: stands beside every figure of a benchmark."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from lsast_engines.environment import installed_versions

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino")
"""What computes, if it is installed."""

FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "bf16", "i8mm", "sve"),
)
"""Flags of a CPU that decide how fast it multiplies (Linux' names, x86 and Arm)."""


def describe(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Processor, flags, cores, system, load, and versions of lsast and of what is installed of `packages`."""
    facts = _cpuinfo()
    there = facts.get("flags", facts.get("Features", "")).split()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in there],
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": load(),
        "versions": {"python": platform.python_version(), **installed_versions("lsast", *packages)},
    }


def load() -> float | None:
    """Processes that wanted to run over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpuinfo() -> dict[str, str]:
    """The first processor in Linux' list; elsewhere nothing."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return {}
    lines = info.read_text().partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
