"""Style files: written whole, read a stage at a time.

One safetensors file holds ``kv_unet`` [stages, T, Wu] and ``kv_control`` [stages, T, Wc] in half precision. Its
metadata is one JSON object under the key ``lsast``: safetensors writes several keys in random order, one key keeps
the bytes of equal styles equal. It holds a SHA-256 for every stage, so that a run which visits seven of ten stages
reads, and proves, seven.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import StyleError, fault_list
from ..files import replace_file
from .style_defaults import read_guidance_baked, read_style_defaults

if TYPE_CHECKING:
    from .style import Style

FORMAT = 2
"""Format number of style files."""

TENSORS = ("kv_unet", "kv_control")
"""The tensors of a style."""

_KEY = "lsast"
_HEADER = {"name": str, "base": str, "stages": int, "tokens": int}


class StageKV(NamedTuple):
    """What the denoiser takes at a step of one stage, float32."""

    kv_unet: npt.NDArray[np.float32]
    """[T, Wu]"""
    kv_control: npt.NDArray[np.float32]
    """[T, Wc]"""


class StyleFile:
    """A style on disk. What is read stays in memory; a file that takes its place on disk does not show.

    One thread at a time.
    """

    def __init__(self, path: Path) -> None:
        """Open a style file and read what describes it; the rows follow when they are asked for.

        Raises:
            StyleError: not there, not a style, of another format, or damaged; all faults at once.
        """
        self.path = path
        self._file, header = _open(path)
        self._shapes = {name: list(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        faults = [
            f"{key}: found {header.get(key)!r}; expected {'text' if kind is str else 'a whole number'}"
            for key, kind in _HEADER.items()
            if not isinstance(header.get(key), kind) or isinstance(header.get(key), bool)
        ]
        meta = header.get("meta", {})
        if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
            faults.append("meta: expected texts only")
            meta = {}
        self.defaults: dict[str, Any]
        """What the style asks for unless told otherwise (`style_defaults`)."""
        self.defaults, wrong = read_style_defaults(meta)
        faults += wrong
        self.guidance_baked: float | None
        """The guidance that one pass gives with this style, as two passes gave with the one it was distilled from; such
        a style is painted with guidance 1. None of any other style."""
        self.guidance_baked, wrong = read_guidance_baked(meta)
        faults += wrong
        self.name: str = header.get("name", "")
        self.base: str = header.get("base", "")
        """Fingerprint of the base (`Manifest.fingerprint`) that projected it; it fits no other."""
        self.stages: int = header.get("stages", 0)
        self.tokens: int = header.get("tokens", 0)
        self.meta: dict[str, str] = meta
        """Licence, training facts and the like; kept, not interpreted."""
        self._digests: Any = header.get("sha256")
        self._rows: dict[int, StageKV] = {}
        faults += self._tensor_faults()
        if faults:
            raise StyleError(fault_list(f"style file {path} is damaged:", faults))

    def width(self, tensor: str) -> int:
        """Columns of the rows of `tensor`, one of `TENSORS`."""
        return int(self._shapes[tensor][2])

    @property
    def read_stages(self) -> list[int]:
        """The stages that are in memory."""
        return sorted(self._rows)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that are in memory."""
        return sum(tensor.nbytes for row in self._rows.values() for tensor in row)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the checksums of all stages: equal for equal keys and values, whatever is in memory."""
        return hashlib.sha256(json.dumps(self._digests).encode()).hexdigest()

    def row(self, stage: int) -> StageKV:
        """Keys and values of one stage, 0 … stages - 1.

        Raises:
            StyleError: its values are not those that were written, or not finite.
        """
        if stage not in self._rows:
            tensors = {name: self._file.get_slice(name)[stage : stage + 1][0] for name in TENSORS}
            if stage_digest(tensors) != self._digests[stage]:
                raise StyleError(
                    f"style file {self.path} is damaged: found other values of stage {stage} than were written "
                    "(SHA-256 differs); copy or bake the style again"
                )
            for name, tensor in tensors.items():
                if not np.isfinite(tensor).all():
                    raise StyleError(f"style file {self.path}: found NaN or infinite values in {name} of stage {stage}")
            self._rows[stage] = StageKV(*(np.ascontiguousarray(tensors[name], dtype=np.float32) for name in TENSORS))
        return self._rows[stage]

    def load(self) -> Style:
        """The whole style.

        Raises:
            StyleError: see `row`.
        """
        from .style import Style

        rows = [self.row(stage) for stage in range(self.stages)]
        unet, control = (np.stack([getattr(row, name) for row in rows]) for name in TENSORS)
        return Style(self.name, self.base, self.stages, self.tokens, unet, control, self.meta)

    def _tensor_faults(self) -> list[str]:
        missing = [name for name in TENSORS if name not in self._shapes]
        faults = [f"{name}: found no such tensor; expected [stages, tokens, width]" for name in missing]
        for name in TENSORS:
            shape = self._shapes.get(name, [self.stages, self.tokens, 1])
            if len(shape) != 3 or shape[:2] != [self.stages, self.tokens] or 0 in shape:
                faults.append(f"{name}: found shape {shape}; expected [{self.stages}, {self.tokens}, width]")
        if not isinstance(self._digests, list) or len(self._digests) != self.stages:
            faults.append(f"sha256: found {self._digests!r}; expected a text for each of {self.stages} stages")
        return faults


def write_style(style: Style, path: Path) -> None:
    """Write `style`, tensors in fp16; equal styles give equal bytes, and no half file is ever seen.

    Raises:
        StyleError: values beyond fp16's range of ±65504.
    """
    from safetensors.numpy import save

    with np.errstate(over="ignore"):
        tensors = {name: getattr(style, name).astype(np.float16) for name in TENSORS}
    wide = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if wide:
        faults = [f"{name}: found {np.abs(getattr(style, name)).max():g}; expected at most 65504" for name in wide]
        raise StyleError(fault_list(f"style {style.name!r} does not fit half precision:", faults))
    header: dict[str, Any] = {
        "format": FORMAT,
        "name": style.name,
        "base": style.base,
        "stages": style.stages,
        "tokens": style.tokens,
        "meta": style.meta,
        "sha256": [stage_digest({name: tensors[name][stage] for name in TENSORS}) for stage in range(style.stages)],
    }
    with replace_file(path) as handle:
        handle.write(save(tensors, metadata={_KEY: json.dumps(header, sort_keys=True, ensure_ascii=False)}))


def stage_digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 (hex) over names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """The open file and its header, of a format that is supported."""
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="numpy")
        header = json.loads((file.metadata() or {}).get(_KEY, "null"))
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
    return file, header
