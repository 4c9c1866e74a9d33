"""The device of a training."""

from __future__ import annotations

import torch

from lsast_engines.errors import UsageError


def find_device(name: str | None) -> torch.device:
    """The device that torch calls `name`; None and ``auto`` are a GPU of CUDA if one is there, or else the CPU.

    Raises:
        UsageError: it is not there.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises for a device not there
        count = torch.cuda.device_count()
        found = ["cpu", *(f"cuda:{i}" for i in range(count)), *(["mps"] if torch.backends.mps.is_available() else [])]
        reason = str(error).split("\n")[0]
        raise UsageError(f"found --device {name} ({reason}); expected one of {', '.join(found)}") from error


def fused(device: torch.device) -> dict[str, bool]:
    """The arguments of an optimiser on `device`: one kernel for all weights on a GPU."""
    return {"fused": True} if device.type == "cuda" else {}
