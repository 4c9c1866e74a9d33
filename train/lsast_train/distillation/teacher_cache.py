"""The teacher's samples on disk, so that a stopped distillation goes on without running the teacher again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lsast_engines.files import replace_file

from .teacher import ContentBatch, TeacherSamples

Samples: TypeAlias = tuple[ContentBatch, TeacherSamples]
"""Pictures, and the teacher's samples on the way to their paintings."""


def save_samples(path: Path, sets: Mapping[str, Samples], identity: Mapping[str, Any]) -> None:
    """Write `sets` whole; `identity` (JSON values) is what they were computed from."""
    tensors = {
        f"{name}.{field.name}": getattr(part, field.name).contiguous()
        for name, parts in sets.items()
        for part in parts
        for field in fields(part)
    }
    with replace_file(path) as handle:
        handle.write(save(tensors, {"identity": json.dumps(identity, sort_keys=True)}))


def load_samples(path: Path, identity: Mapping[str, Any]) -> dict[str, Samples] | None:
    """What `save_samples` wrote; None if there is no such file, or a damaged one, or one of another `identity`."""
    try:
        with safe_open(str(path), "pt") as file:
            if (file.metadata() or {}).get("identity") != json.dumps(identity, sort_keys=True):
                return None
            tensors: dict[str, torch.Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None

    def part(kind: Any, name: str) -> Any:
        return kind(**{field.name: tensors[f"{name}.{field.name}"] for field in fields(kind)})

    names = sorted({key.partition(".")[0] for key in tensors})
    return {name: (part(ContentBatch, name), part(TeacherSamples, name)) for name in names}
