"""A style: the artist's prompts, already projected through every cross-attention of a base.

One safetensors file holds ``kv_unet`` [stages, T, Wu] and ``kv_control`` [stages, T, Wc] in half precision. Its
metadata is one JSON object under the key ``lsast``: safetensors writes several keys in random order, one key keeps
the bytes of equal styles equal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import StyleError, UsageError, fault_list
from .files import replace_file

FORMAT = 1
"""Format number of style files that this version writes and reads."""

_TENSORS = ("kv_unet", "kv_control")
_KEY = "lsast"


@dataclass(frozen=True, eq=False)
class Style:
    """Keys and values of one style for one base, float32 in memory, rows contiguous.

    Row `stage` of each tensor is what the denoiser takes at a step of that stage. Which prompt serves which stage and
    layer group was settled when the style was baked.

    Raises:
        StyleError: tensors that do not have the declared shape, or are not finite; all faults at once.
    """

    name: str
    base: str
    """Fingerprint of the base (`Manifest.fingerprint`) that projected it; it fits no other."""
    stages: int
    tokens: int
    kv_unet: npt.NDArray[np.float32]
    """[stages, T, Wu]: keys and values of the U-Net's cross-attentions, packed as the manifest's `attention_layers`."""
    kv_control: npt.NDArray[np.float32]
    """[stages, T, Wc]: the same of the ControlNet."""
    meta: dict[str, str] = field(default_factory=dict)
    """Licence, training facts and the like; kept, not interpreted."""

    def __post_init__(self) -> None:
        faults = []
        for tensor_name in _TENSORS:
            tensor = np.ascontiguousarray(getattr(self, tensor_name), dtype=np.float32)
            object.__setattr__(self, tensor_name, tensor)
            expected = f"[{self.stages}, {self.tokens}, width]"
            if tensor.ndim != 3 or tensor.shape[:2] != (self.stages, self.tokens) or 0 in tensor.shape:
                faults.append(f"{tensor_name}: found shape {list(tensor.shape)}; expected {expected}")
            elif not np.isfinite(tensor).all():
                faults.append(f"{tensor_name}: found NaN or infinite values; expected finite ones")
        if faults:
            raise StyleError(fault_list(f"style {self.name!r} is not usable:", faults))

    def save(self, path: Path) -> None:
        """Write one safetensors file, tensors in fp16; equal styles give equal bytes, and no half file is ever seen.

        Raises:
            StyleError: values beyond fp16's range of ±65504.
        """
        from safetensors.numpy import save

        with np.errstate(over="ignore"):
            tensors = {name: getattr(self, name).astype(np.float16) for name in _TENSORS}
        wide = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
        if wide:
            faults = [f"{name}: found {np.abs(getattr(self, name)).max():g}; expected at most 65504" for name in wide]
            raise StyleError(fault_list(f"style {self.name!r} does not fit half precision:", faults))
        header: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "base": self.base,
            "stages": self.stages,
            "tokens": self.tokens,
            "meta": self.meta,
            "sha256": _digest(tensors),
        }
        with replace_file(path) as handle:
            handle.write(save(tensors, metadata={_KEY: json.dumps(header, sort_keys=True, ensure_ascii=False)}))

    @classmethod
    def load(cls, path: Path) -> Style:
        """Read a style file.

        Raises:
            StyleError: not there, not a style, of another format, or damaged; all faults at once.
        """
        header, tensors = _read(path)
        faults = []
        for key, kind in (("name", str), ("base", str), ("stages", int), ("tokens", int), ("sha256", str)):
            if not isinstance(header.get(key), kind) or isinstance(header.get(key), bool):
                faults.append(
                    f"{key}: found {header.get(key)!r}; expected {'text' if kind is str else 'a whole number'}"
                )
        meta = header.get("meta", {})
        if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
            faults.append("meta: expected texts only")
        missing = [name for name in _TENSORS if name not in tensors]
        faults += [f"{name}: found no such tensor; expected [stages, tokens, width]" for name in missing]
        if not missing and header.get("sha256") != _digest({name: tensors[name] for name in _TENSORS}):
            faults.append(
                "tensors: found other values than were written (SHA-256 differs); copy or bake the style again"
            )
        if faults:
            raise StyleError(fault_list(f"style file {path} is damaged:", faults))
        try:
            return cls(
                header["name"],
                header["base"],
                header["stages"],
                header["tokens"],
                tensors["kv_unet"],
                tensors["kv_control"],
                meta,
            )
        except StyleError as error:
            raise StyleError(f"style file {path} is damaged: {error}") from error

    @staticmethod
    def mix(parts: Sequence[tuple[Style, float]]) -> Style:
        """The weighted mean of styles of one base; weights are normalised to sum to 1.

        Raises:
            UsageError: no part, a negative or non-finite weight, or weights that sum to 0.
            StyleError: styles of other bases or shapes than the first one's.
        """
        weights = [weight for _, weight in parts]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise UsageError(f"found style weights {weights}; expected weights of at least 0 with one above 0")
        first = parts[0][0]
        faults = [fault for style, _ in parts[1:] for fault in _differences(style, first)]
        if faults:
            raise StyleError(fault_list("these styles do not mix:", faults))
        shares = [(style, weight / sum(weights)) for style, weight in parts]
        mixed = {
            name: sum(share * getattr(style, name).astype(np.float64) for style, share in shares) for name in _TENSORS
        }
        title = "+".join(f"{style.name}:{share:.3g}" for style, share in shares)
        return Style(title, first.base, first.stages, first.tokens, mixed["kv_unet"], mixed["kv_control"])


def _differences(style: Style, first: Style) -> list[str]:
    """Faults that keep `style` from being added to `first`."""
    faults = []
    if style.base != first.base:
        faults.append(
            f"{style.name}: found base {style.base[:12]}…; expected {first.base[:12]}…, that of {first.name}; "
            f"export both styles for one base"
        )
    for name in _TENSORS:
        found, expected = getattr(style, name).shape, getattr(first, name).shape
        if found != expected:
            faults.append(f"{style.name}: found {name} {list(found)}; expected {list(expected)}, that of {first.name}")
    return faults


def _read(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Header and tensors of a style file of the supported format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except FileNotFoundError:
        raise StyleError(f"found no style file {path}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise StyleError(f"style file {path} cannot be read ({error}); copy or bake the style again") from error
    if not isinstance(header, dict) or "format" not in header:
        raise StyleError(f"{path} is a safetensors file but no style; bake one with: lsast-export --style NAME")
    if header["format"] != FORMAT:
        raise StyleError(
            f"style file {path} has format {header['format']}; this version reads format {FORMAT}: "
            "bake the style again, or update lsast"
        )
    return header, tensors


def _digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
