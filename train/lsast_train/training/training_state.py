"""Exact resume without pickle: weights, optimiser state and counters in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lsast_engines.errors import TrainingError, fault_list, shape_faults
from lsast_engines.files import replace_file


def save_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> None:
    """Write the states of `modules` and `optimizer`, and `facts` (JSON values), whole or not at all."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    state = optimizer.state_dict()["state"]
    for index, entry in state.items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in entry.items()}
    data = save(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, {"facts": json.dumps(facts)}
    )
    with replace_file(path) as handle:
        handle.write(data)


def load_checkpoint(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote into `modules` and `optimizer`; returns the facts.

    Raises:
        TrainingError: the file is damaged or belongs to modules of another shape (all faults at once).
    """
    try:
        with safe_open(str(path), "pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{path} is not a checkpoint of lsast-train ({error}); start without --resume") from error
    load_modules(tensors, modules, f"{path} was written with other options:")
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, field = key.split(".")
            entries.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    # The file holds contiguous tensors; a fused optimiser reads memory as it lies, channels last as the weights.
    for parameter, entry in optimizer.state.items():
        for field, value in entry.items():
            if value.dim() > 1 and value.shape == parameter.shape:
                entry[field] = torch.empty_like(parameter).copy_(value)
    return facts


def load_modules(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], heading: str) -> None:
    """Load into each of `modules` its part of `tensors`, whose names begin with that of the module.

    Raises:
        TrainingError: tensors that are missing, of another shape, or not expected, all of them below `heading`.
    """
    states = {
        name: {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        for name in modules
    }
    faults = [
        f"{name}.{fault}"
        for name, module in modules.items()
        for fault in shape_faults(
            {key: value.shape for key, value in states[name].items()},
            {key: value.shape for key, value in module.state_dict().items()},
        )
    ]
    if faults:
        raise TrainingError(fault_list(heading, faults))
    for name, module in modules.items():
        module.load_state_dict(states[name])
