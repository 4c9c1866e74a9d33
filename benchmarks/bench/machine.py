"""What a figure was measured on: stands beside every figure of a benchmark."""

import os
import platform
from typing import Any

from lsast_engines.environment import cpu_facts, installed_versions, real_cpu_features

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino")
"""What computes, if it is installed."""

FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "bf16", "i8mm", "sve"),
)
"""Flags of a CPU that decide how fast it multiplies (Linux' names, x86 and Arm)."""


def describe(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Processor, flags, cores, system, load, and versions of lsast and of what is installed of `packages`."""
    return {
        "cpu": cpu_facts().get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in real_cpu_features()],
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": load(),
        "versions": {"python": platform.python_version(), **installed_versions("lsast", *packages)},
    }


def load() -> float | None:
    """Processes that wanted to run over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
