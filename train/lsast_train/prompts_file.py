"""The artefact of an inversion: ``NAME.prompts.safetensors``, what `lsast-export` bakes into a style.

Tensors, all float32: ``prompts`` [stages, 3, tokens, dim], which matrix serves what already resolved; ``matrices``
[K, tokens, dim]; for the attention generator its maps ``query``, ``key``, ``value`` [dim, dim]. The metadata is one
JSON object under the key ``lsast``: several keys would be written in random order, and equal prompts would differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lsast_engines.errors import StyleError, fault_list
from lsast_engines.files import replace_file

from .attention import GROUPS
from .base import Base, check_fingerprint
from .options import Generator, Gradient, Layout, Variant, choice_faults, style_name_faults
from .prompt_space import PromptSpace, matrix_table

FORMAT = 1
"""Format number of prompt files that this version writes and reads."""

_KEY = "lsast"
_MAPS = ("query", "key", "value")


@dataclass(frozen=True, eq=False)
class Prompts:
    """The learned prompts of a style, bound to one base.

    Raises:
        StyleError: parts that do not fit together, or values that are not finite; all faults at once.
    """

    name: str
    base: str
    """Fingerprint of the base they were learned on."""
    variant: Variant
    generator: Generator
    layout: Layout
    gradient: Gradient
    prompts: torch.Tensor
    """[stages, 3, tokens, dim], groups in the order of `GROUPS`."""
    matrices: torch.Tensor
    """[K, tokens, dim]: the learned matrices."""
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    """``query``, ``key``, ``value`` [dim, dim] of the attention generator; empty for ``direct``."""
    meta: dict[str, str] = field(default_factory=dict)
    """Licence and training facts; kept, not interpreted."""

    def __post_init__(self) -> None:
        if faults := self._faults():
            raise StyleError(fault_list(f"the prompts of {self.name!r} are not usable:", faults))

    @classmethod
    def of(cls, space: PromptSpace, name: str, base: str, meta: Mapping[str, str]) -> Prompts:
        """The prompts that `space` gives now, copied to the CPU."""
        with torch.no_grad():
            prompts = space.prompts().cpu().clone()
        maps = {key: value.detach().cpu().clone() for key, value in space.maps().items()}
        matrices = space.matrices.detach().cpu().clone()
        kind = (space.variant, space.generator, space.layout, space.gradient)
        return cls(name, base, *kind, prompts, matrices, maps, dict(meta))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is stored, by name."""
        return {"prompts": self.prompts, "matrices": self.matrices, **self.maps}

    def _faults(self) -> list[str]:
        named = {"variant": self.variant, "generator": self.generator, "layout": self.layout, "gradient": self.gradient}
        faults = style_name_faults(self.name) + choice_faults(named)
        faults += [
            f"{name}: found {tensor.dtype}; expected torch.float32"
            for name, tensor in self.tensors().items()
            if tensor.dtype != torch.float32
        ]
        shape = tuple(self.prompts.shape)
        if len(shape) != 4 or shape[1] != len(GROUPS) or 0 in shape:
            faults.append(f"prompts: found shape {list(shape)}; expected [stages, {len(GROUPS)}, tokens, dim]")
        elif not faults:
            stages, _, tokens, dim = shape
            count = int(matrix_table(self.variant, self.layout, stages).max()) + 1
            expected: dict[str, tuple[int, ...]] = {"matrices": (count, tokens, dim)}
            if self.generator == "attention":
                expected |= dict.fromkeys(_MAPS, (dim, dim))
            others = {"matrices": self.matrices, **self.maps}
            faults += [f"{name}: missing; expected {list(expected[name])}" for name in expected.keys() - others.keys()]
            faults += [f"{name}: found, but not expected" for name in others.keys() - expected.keys()]
            faults += [
                f"{name}: found shape {list(others[name].shape)}; expected {list(expected[name])}"
                for name in others.keys() & expected.keys()
                if tuple(others[name].shape) != expected[name]
            ]
        faults += [
            f"{name}: found NaN or infinite values; expected finite ones"
            for name, tensor in self.tensors().items()
            if tensor.dtype == torch.float32 and not torch.isfinite(tensor).all()
        ]
        return sorted(faults)


def save_prompts(prompts: Prompts, path: Path) -> None:
    """Write `prompts` to `path`, whole; equal prompts give equal bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in prompts.tensors().items()}
    header = {
        "format": FORMAT,
        "name": prompts.name,
        "base": prompts.base,
        "variant": prompts.variant,
        "generator": prompts.generator,
        "layout": prompts.layout,
        "gradient": prompts.gradient,
        "meta": prompts.meta,
        "sha256": _digest(tensors),
    }
    with replace_file(path) as handle:
        handle.write(save(tensors, {_KEY: json.dumps(header, sort_keys=True, ensure_ascii=False)}))


def load_prompts(path: Path, base: Base | None = None) -> Prompts:
    """Read a prompt file; with `base`, refuse prompts that were learned on another one.

    Raises:
        StyleError: not there, no prompt file, of another format, damaged (all faults at once), or of another base.
    """
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except FileNotFoundError:
        raise StyleError(
            f"found no prompt file {path}; learn one with: lsast-train --style NAME --images DIR"
        ) from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise StyleError(f"prompt file {path} cannot be read ({error}); train or copy it again") from error
    if not isinstance(header, dict) or "variant" not in header:
        raise StyleError(f"{path} is a safetensors file but holds no prompts; expected NAME.prompts.safetensors")
    if header.get("format") != FORMAT:
        raise StyleError(
            f"prompt file {path} has format {header.get('format')!r}; this version reads format {FORMAT}: "
            "train again, or update lsast"
        )
    faults = _header_faults(header)
    faults += [f"{name}: missing tensor" for name in ("prompts", "matrices") if name not in tensors]
    if header.get("sha256") != _digest(tensors):
        faults.append("tensors: found other values than were written (SHA-256 differs); train or copy the file again")
    if faults:
        raise StyleError(fault_list(f"prompt file {path} is damaged:", faults))
    maps = {name: tensor for name, tensor in tensors.items() if name not in ("prompts", "matrices")}
    kind = (header["variant"], header["generator"], header["layout"], header["gradient"])
    try:
        prompts = Prompts(
            header["name"], header["base"], *kind, tensors["prompts"], tensors["matrices"], maps, header["meta"]
        )
    except StyleError as error:
        raise StyleError(f"prompt file {path} is damaged: {error}") from error
    if base is not None:
        check_fingerprint(prompts.base, base, f"prompt file {path}")
    return prompts


def _header_faults(header: dict[str, Any]) -> list[str]:
    texts = ("name", "base", "variant", "generator", "layout", "gradient", "sha256")
    faults = [
        f"{key}: found {header.get(key)!r}; expected text" for key in texts if not isinstance(header.get(key), str)
    ]
    meta = header.get("meta")
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        faults.append("meta: expected an object of texts")
    return faults


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
