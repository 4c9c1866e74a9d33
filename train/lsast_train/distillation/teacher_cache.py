"""The teacher's states on disk, so that a stopped distillation goes on without having them painted again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lsast_engines.files import replace_file

from .teacher import Content, States

Side = tuple[Content, States]
"""Pictures, and the states of their paintings."""

_PARTS = {**dict.fromkeys(Content.__dataclass_fields__, Content), **dict.fromkeys(States.__dataclass_fields__, States)}


def save_lessons(path: Path, sides: Mapping[str, Side], identity: Mapping[str, Any]) -> None:
    """Write `sides` whole; `identity` (JSON values) says what they were made of."""
    tensors = {
        f"{side}.{name}": getattr(part, name).contiguous()
        for side, parts in sides.items()
        for part in parts
        for name in type(part).__dataclass_fields__
    }
    with replace_file(path) as handle:
        handle.write(save(tensors, {"identity": json.dumps(identity, sort_keys=True)}))


def load_lessons(path: Path, identity: Mapping[str, Any]) -> dict[str, Side] | None:
    """What `save_lessons` wrote; None if it is not there, damaged, or made of something else than `identity`."""
    try:
        with safe_open(str(path), "pt") as file:
            if (file.metadata() or {}).get("identity") != json.dumps(identity, sort_keys=True):
                return None
            tensors: dict[str, torch.Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    sides = sorted({key.partition(".")[0] for key in tensors})
    return {
        side: (
            Content(**{name: tensors[f"{side}.{name}"] for name, kind in _PARTS.items() if kind is Content}),
            States(**{name: tensors[f"{side}.{name}"] for name, kind in _PARTS.items() if kind is States}),
        )
        for side in sides
    }
