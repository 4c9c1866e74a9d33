"""Which backend and compute dtype ``auto`` takes for a bundle: the fastest that was measured on such a processor.

`ROWS` is the rule. docs/guides/speed.md shows it, docs/results.md the measurements.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from ..bundle.bundle import Bundle
from ..bundle.manifest import QUANTIZED
from ..environment import cpu_features
from ..errors import BackendError, install_command
from .base import ComputeDtype
from .registry import EXTRAS, find_backend, has_device

DtypeOrAuto = ComputeDtype | Literal["auto"]

LEAST_PSNR = 45.0
"""The smallest allowed PSNR, in dB, between a picture that ``auto`` paints and the same picture in float32.
``lsast-export check`` tests it; painting does not. A bundle in int8 has its own limit (`lsast_export.bundle.check`)."""

_log = logging.getLogger("lsast.choice")


@dataclass(frozen=True)
class Row:
    """A way to compute on a CPU, and where it is the fastest."""

    backend: str
    compute_dtype: ComputeDtype
    feature: str
    """What the processor must have, of `cpu_features`; empty if nothing."""
    measured: str
    """How fast it is, compared with ONNX Runtime in float32."""


ROWS = (
    Row("openvino", "bf16", "amx_bf16", "3 to 7 times as fast at Stable Diffusion 1.5's size, 1.3 times with mini"),
    Row("openvino", "bf16", "avx512_bf16", "1.9 times as fast at Stable Diffusion 1.5's size, 1.5 to 1.7 with mini"),
    Row("onnxruntime", "fp32", "", "with mini 1.1 to 1.2 times as fast as OpenVINO in fp32, and opened sooner"),
    Row("openvino", "fp32", "", "where ONNX Runtime is not installed"),
)
"""From the fastest to the slowest. AVX-512 alone emulates bf16, more slowly than fp32; Arm was not measured."""

INT8_MEASURED = "in int8 1.2 times as fast as ONNX Runtime at Stable Diffusion 1.5's size, 1.1 to 1.4 times with mini"
"""How fast OpenVINO is with a bundle in int8 whose float layers run in bf16; measured on ``avx512_bf16``."""


@dataclass(frozen=True)
class Choice:
    """What a bundle is computed with."""

    backend: str
    device: str
    compute_dtype: ComputeDtype
    reason: str
    """Why, in words."""
    remedy: str = ""
    """What to install for something faster, and how fast; empty if nothing is known."""


def choose(
    bundle: Bundle | None = None, backend: str = "auto", device: str = "auto", compute_dtype: DtypeOrAuto = "auto"
) -> Choice:
    """Choose the arguments that are ``auto``. An argument that names something is taken as it is, or refused.

    Args:
        bundle: of one in int8, the compute dtype is that of its float layers; None is one that is not quantized.
        backend, device, compute_dtype: see `registry.open_engine`, also for the errors.
    """
    backend, device, named = backend.lower(), device.lower(), None if compute_dtype == "auto" else compute_dtype
    passed_over: dict[str, None] = {}  # why no earlier row is taken, each reason once
    remedy, choice = "", None
    quantized = bundle is not None and bundle.manifest.storage_dtype in QUANTIZED
    if device in ("auto", "cpu") and "auto" in (backend, compute_dtype):
        for row in ROWS:
            if backend not in ("auto", row.backend) or named not in (None, row.compute_dtype):
                continue
            fault, missing = _fault(row)
            measured = INT8_MEASURED if row.feature and quantized else row.measured
            if row.feature in cpu_features():
                passed_over.clear()  # the rows above want features that the processor lacks: not what decides
            if not fault:
                reason = f"the processor has {row.feature}: {measured}" if row.feature else "; ".join(passed_over)
                reason = reason or f"{named or backend} was named"
                choice = Choice(row.backend, "cpu", row.compute_dtype, reason, remedy)
                break
            passed_over[fault] = None
            if missing and not remedy:
                remedy = f"{install_command(EXTRAS[row.backend])}: {row.backend} in {row.compute_dtype} is {measured}"
    if choice is None:
        reason = "named" if named else "GPUs compute in fp16 by default"
        choice = Choice(*find_backend(backend, device, named), reason=reason)
    # Before VNNI, x86 holds sums of two products of 8 bits in 16 bits.
    overflows = "avx2" in cpu_features() and not cpu_features() & {"avx512_vnni", "avx_vnni"}
    if quantized and overflows and (choice.backend, choice.device) == ("openvino", "cpu"):
        _log.warning("OpenVINO's 8-bit products overflow on this processor (AVX2 without VNNI); onnxruntime's do not")
    return choice


def _fault(row: Row) -> tuple[str, bool]:
    """Why `row` is not taken, empty if it is; and whether its backend is not installed."""
    if row.feature and row.feature not in cpu_features():
        return f"the processor has no {row.feature}", False
    try:
        if not has_device(row.backend, "cpu"):
            return f"{row.backend} finds no processor", False
        if row.backend == "openvino":
            from .openvino import compute_dtypes

            if row.compute_dtype not in compute_dtypes("cpu"):
                return f"{row.backend} has no {row.compute_dtype} here", False
    except ImportError:
        return f"{row.backend} is not installed", True
    except BackendError as error:
        _log.warning("%s", error)
        return str(error), False
    return "", False
