"""A style: an artist's prompts as keys and values of every cross-attention of one base, in memory and on disk.

A style file is one safetensors file: ``kv_unet`` [stages, T, Wu] and ``kv_control`` [stages, T, Wc] in float16, and a
JSON object under the metadata key ``lsast``. safetensors writes several keys in random order; with one key, equal
styles give equal bytes. The object holds a SHA-256 of every stage: a run that visits seven of ten stages reads, and
verifies, seven.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..declared_options import rules_of
from ..errors import StyleError, UsageError, fault_list
from ..files import replace_file
from ..removed import RENAMED_OPTIONS, RENAMED_VALUES
from .json_fields import is_number, parse_json, read_object, read_value
from .manifest import Defaults
from .safetensors_header import Slot, read_slots

FORMAT = 2
"""Format number of style files."""

TENSORS = ("kv_unet", "kv_control")
"""The tensors of a style."""

BUNDLE_DEFAULTS: dict[str, type] = {name: rule.type for name, rule in rules_of(Defaults).items()}
"""The options that a bundle has defaults for, and their types; the runtime checks their ranges."""

STYLE_DEFAULTS = {name: kind for name, kind in BUNDLE_DEFAULTS.items() if name not in ("style", "size")}
STYLE_DEFAULTS["palette"] = float
"""The same of a style that has its own."""

_DEFAULTS_KEY = "defaults"
_LATENT_STATISTICS_KEY = "latent_statistics"
"""Keys in a style's `meta` of its default options, and of the statistics of the artist's latents, as JSON."""

DISTILLED_GUIDANCE_KEY = "guidance_baked"
"""Key in a style's `meta` of the guidance scale that it was distilled with, as text."""

_METADATA_KEY = "lsast"


@dataclass(frozen=True)
class _Header:
    """The JSON object of a style file."""

    format: int
    name: str
    base: str
    stages: int
    tokens: int
    meta: dict[str, str]
    sha256: tuple[str, ...]


class StageKV(NamedTuple):
    """Keys and values of one stage, float32."""

    kv_unet: npt.NDArray[np.float32]
    """[T, Wu]"""
    kv_control: npt.NDArray[np.float32]
    """[T, Wc]"""


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel over an artist's works, in the units of the U-Net; a
    `UsageError` for no channels, not as many of both, or a standard deviation that is not above 0."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (len(self.mean) == len(self.std) > 0 and min(self.std) > 0):
            raise UsageError(
                f"found {self!r:.80}; expected a number for each latent channel each, those of std above 0"
            )

    def to_meta(self) -> dict[str, str]:
        """The entry of a style's `meta`."""
        rounded = {name: [round(value, 4) for value in values] for name, values in vars(self).items()}
        return {_LATENT_STATISTICS_KEY: json.dumps(rounded, sort_keys=True)}

    @classmethod
    def from_meta(cls, meta: Mapping[str, str]) -> tuple[LatentStatistics | None, list[str]]:
        """The statistics in a style's `meta`, None without any, and the faults found in them."""
        faults: list[str] = []
        if _LATENT_STATISTICS_KEY not in meta:
            return None, faults
        return read_object(cls, _parse_entry(meta, _LATENT_STATISTICS_KEY), _LATENT_STATISTICS_KEY, faults), faults


@dataclass(frozen=True, eq=False)
class Style:
    """Keys and values of one style for one base, float32 and contiguous. A `StyleError` lists all tensors that do not
    have the declared shape, or are not finite.

    The prompt of each stage and layer group was chosen when the style was baked (docs/method.md §1.4).
    """

    name: str
    base: str
    """Fingerprint of the base (`Manifest.fingerprint`) that projected the prompts; the style fits no other base."""
    stages: int
    tokens: int
    kv_unet: npt.NDArray[np.float32]
    """[stages, T, Wu]: keys and values of the U-Net's cross-attentions, packed as the manifest's `attention_layers`."""
    kv_control: npt.NDArray[np.float32]
    """[stages, T, Wc]: the same for the ControlNet."""
    meta: dict[str, str] = field(default_factory=dict)
    """Licence, training settings, default options (`encode_defaults`)."""

    def __post_init__(self) -> None:
        faults = []
        for name in TENSORS:
            tensor = np.ascontiguousarray(getattr(self, name), dtype=np.float32)
            object.__setattr__(self, name, tensor)
            faults += _shape_faults(name, list(tensor.shape), self.stages, self.tokens)
            if not np.isfinite(tensor).all():
                faults.append(f"{name}: found NaN or infinite values; expected finite ones")
        if faults:
            raise StyleError(fault_list(f"style {self.name!r} is not usable:", faults))

    def width(self, tensor: str) -> int:
        """Columns of `tensor`, one of `TENSORS`."""
        return int(getattr(self, tensor).shape[2])

    def stage(self, stage: int) -> StageKV:
        """Keys and values of one stage, 0 … stages - 1."""
        return StageKV(self.kv_unet[stage], self.kv_control[stage])

    def save(self, path: Path) -> None:
        """Write the style file `path`, tensors in float16; a `StyleError` for values beyond its range of ±65504, and
        for a name that is no file name (`style_name_faults`)."""
        from safetensors.numpy import save

        if faults := style_name_faults(self.name):
            raise StyleError(fault_list(f"style {self.name!r} cannot be saved:", faults))
        with np.errstate(over="ignore"):
            tensors = {name: getattr(self, name).astype(np.float16) for name in TENSORS}
        if wide := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
            faults = [f"{name}: found {np.abs(getattr(self, name)).max():g}; expected at most 65504" for name in wide]
            raise StyleError(fault_list(f"style {self.name!r} does not fit float16:", faults))
        digests = [stage_digest({name: tensors[name][stage] for name in TENSORS}) for stage in range(self.stages)]
        header = _Header(FORMAT, self.name, self.base, self.stages, self.tokens, self.meta, tuple(digests))
        with replace_file(path) as handle:
            handle.write(save(tensors, {_METADATA_KEY: json.dumps(vars(header), sort_keys=True, ensure_ascii=False)}))

    @classmethod
    def load(cls, path: Path) -> Style:
        """Read all stages of a style file; raises as `StyleFile`."""
        return StyleFile(path).load()


class StyleFile:
    """A style file, whose stages are read when they are asked for, and then stay in memory.

    Replacing the file on disk has no effect: this one stays open. Overwriting it is noticed by the checksum of the next
    stage that is read. The file is not mapped into memory: a process whose mapped file becomes shorter is killed. For
    one thread at a time.

    Raises:
        StyleError: not found, not a style, of another format, or damaged; all faults at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor, self._slots, data = _open(path)
        # Not when Python ends: a thread may read until then, and the system closes it.
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        faults: list[str] = []
        header = read_object(_Header, data, "", faults)
        if header is None:
            raise StyleError(fault_list(f"style file {path} is damaged:", faults))
        self.name, self.stages, self.tokens = header.name, header.stages, header.tokens
        self.base, self.meta = header.base, header.meta
        faults += style_name_faults(self.name)
        self.defaults, wrong = decode_defaults(self.meta)
        """The style's own default options, a part of `STYLE_DEFAULTS`."""
        self.distilled_guidance, wrong_guidance = _distilled_guidance(self.meta)
        """The guidance scale that the style was distilled with (`lsast-train distill`), None for other styles. One pass
        with this style replaces two passes with that guidance, so it runs with guidance 1."""
        self.latent_statistics, wrong_statistics = LatentStatistics.from_meta(self.meta)
        """Of the artist's works; None for a style that carries none. The option `palette` needs them."""
        faults += wrong + wrong_guidance + wrong_statistics
        self._digests = header.sha256
        self._read: dict[int, StageKV] = {}
        for name in TENSORS:
            if slot := self._slots.get(name):
                faults += _shape_faults(name, list(slot.shape), self.stages, self.tokens)
                if slot.dtype != "F16":
                    faults.append(f"{name}: found type {slot.dtype}; expected F16")
            else:
                faults.append(f"{name}: found no such tensor; expected [{self.stages}, {self.tokens}, width]")
        if len(self._digests) != self.stages:
            faults.append(f"sha256: found {len(self._digests)} texts; expected one for each of {self.stages} stages")
        if faults:
            raise StyleError(fault_list(f"style file {path} is damaged:", faults))

    def width(self, tensor: str) -> int:
        """Columns of `tensor`, one of `TENSORS`."""
        return self._slots[tensor].shape[2]

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that are in memory."""
        return sum(tensor.nbytes for kv in self._read.values() for tensor in kv)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the checksums of all stages: equal for equal keys and values."""
        return hashlib.sha256(json.dumps(self._digests).encode()).hexdigest()

    def stage(self, stage: int) -> StageKV:
        """Keys and values of one stage, 0 … stages - 1; a `StyleError` if they are not those that were written, or not
        finite."""
        if stage not in self._read:
            tensors = {name: self._read_rows(name, stage) for name in TENSORS}
            if stage_digest(tensors) != self._digests[stage]:
                raise StyleError(
                    f"style file {self.path} is damaged: the SHA-256 of stage {stage} differs from the recorded one; "
                    "copy or bake the style again"
                )
            for name, tensor in tensors.items():
                if not np.isfinite(tensor).all():
                    raise StyleError(f"style file {self.path}: found NaN or infinite values in {name} of stage {stage}")
            self._read[stage] = StageKV(*(np.ascontiguousarray(tensors[name], dtype=np.float32) for name in TENSORS))
        return self._read[stage]

    def _read_rows(self, name: str, stage: int) -> npt.NDArray[np.float16]:
        """[T, W] of a tensor, as stored; [0] of a file that was cut off."""
        slot = self._slots[name]
        length = slot.length // self.stages
        offset = slot.offset + stage * length
        if hasattr(os, "pread"):  # after a fork two processes share the position
            data = os.pread(self._descriptor, length, offset)
        else:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, length)
        return np.frombuffer(data, "<f2").reshape(slot.shape[1:]) if len(data) == length else np.zeros(1, np.float16)

    def load(self) -> Style:
        """The whole style; raises as `stage`."""
        stages = [self.stage(stage) for stage in range(self.stages)]
        unet, control = (np.stack([getattr(kv, name) for kv in stages]) for name in TENSORS)
        return Style(self.name, self.base, self.stages, self.tokens, unet, control, self.meta)


def style_name_faults(name: str) -> list[str]:
    """The fault of a style's name that is no file name on every system, and could be a path; at most one line."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        return []
    return [f"name: found {name!r}; expected up to 100 letters, digits, '.', '_' or '-', a letter or digit first"]


def encode_defaults(values: Mapping[str, Any]) -> dict[str, str]:
    """The entry of a style's `meta` that holds default options; empty for no options. A `UsageError` lists all values
    that are not of `STYLE_DEFAULTS`."""
    if faults := _default_faults(values):
        raise UsageError(fault_list("invalid defaults of a style:", faults))
    return {_DEFAULTS_KEY: json.dumps(dict(values), sort_keys=True)} if values else {}


def decode_defaults(meta: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The default options in a style's `meta`, and the faults found in them."""
    values = _parse_entry(meta, _DEFAULTS_KEY) if _DEFAULTS_KEY in meta else {}
    if not isinstance(values, dict):
        return {}, [f"{_DEFAULTS_KEY}: found {meta[_DEFAULTS_KEY]!r}; expected a JSON object"]
    values = {
        RENAMED_OPTIONS.get(name, name): RENAMED_VALUES.get(f"{name}={value}", value) for name, value in values.items()
    }
    faults = [f"{_DEFAULTS_KEY}: {fault}" for fault in _default_faults(values)]
    return ({} if faults else values), faults


def parse_defaults(pairs: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Defaults of a bundle, from ``KEY=VALUE`` pairs, and of styles by name, from ``STYLE.KEY=VALUE`` pairs. A
    `UsageError` lists all unknown keys and values of a wrong type."""
    values: dict[str, Any] = {}
    for_styles: dict[str, dict[str, Any]] = {}
    faults = []
    for pair in pairs:
        name, separator, text = pair.partition("=")
        style, _, key = name.rpartition(".")
        key, text = RENAMED_OPTIONS.get(key, key), RENAMED_VALUES.get(f"{key}={text}", text)
        types = STYLE_DEFAULTS if style else BUNDLE_DEFAULTS
        try:
            value = types[key](text)
            if not isinstance(value, str) and not is_number(value):
                raise ValueError("NaN or infinite")
            (for_styles.setdefault(style, {}) if style else values)[key] = value
        except KeyError:
            faults.append(f"{pair}: found key {key!r}; expected one of {', '.join(types)}")
        except ValueError:
            faults.append(f"{pair}: found {text!r}; expected a {'whole ' * (types[key] is int)}number")
        if not separator:
            faults.append(f"{pair}: expected KEY=VALUE")
    if faults:
        raise UsageError(fault_list("invalid defaults:", faults))
    return values, for_styles


def _default_faults(values: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    for name, value in values.items():
        if kind := STYLE_DEFAULTS.get(name):
            read_value(kind, value, name, faults)
        else:
            faults.append(f"found {name!r}; expected one of {', '.join(STYLE_DEFAULTS)}")
    return faults


def _parse_entry(meta: Mapping[str, str], key: str) -> Any:
    """The JSON value of an entry of a style's `meta`, its text if it is not JSON."""
    try:
        return parse_json(meta[key])
    except ValueError:
        return meta[key]


def _distilled_guidance(meta: Mapping[str, str]) -> tuple[float | None, list[str]]:
    """The guidance scale in a style's `meta`, None without one, and the faults found in it."""
    if (text := meta.get(DISTILLED_GUIDANCE_KEY)) is None:
        return None, []
    with contextlib.suppress(ValueError):
        if 0 < (scale := float(text)) < math.inf:
            return scale, []
    return None, [f"{DISTILLED_GUIDANCE_KEY}: found {text!r}; expected a number above 0"]


def _shape_faults(name: str, shape: list[int], stages: int, tokens: int) -> list[str]:
    if len(shape) == 3 and shape[:2] == [stages, tokens] and shape[2] > 0:
        return []
    return [f"{name}: found shape {shape}; expected [{stages}, {tokens}, width]"]


def stage_digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 (hex) over names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def _open(path: Path) -> tuple[int, dict[str, Slot], dict[str, Any]]:
    """The descriptor of the open file, its tensors and its header, of a format that this version reads."""
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as on_error:
        try:
            if not path.is_file():
                raise FileNotFoundError(path)
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            on_error.callback(os.close, descriptor)
            with safe_open(path, framework="numpy") as file:  # checks the whole header
                header = parse_json((file.metadata() or {}).get(_METADATA_KEY, "null"))
            slots = read_slots(path)
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return _open(path)  # it was replaced meanwhile
        except FileNotFoundError:
            raise StyleError(f"found no style file {path}") from None
        except (OSError, SafetensorError, ValueError) as error:
            raise StyleError(f"style file {path} cannot be read ({error}); copy or bake the style again") from error
        if not isinstance(header, dict) or "format" not in header:
            raise StyleError(f"{path} is a safetensors file but not a style; bake one with: lsast-export --style NAME")
        if header["format"] != FORMAT:
            raise StyleError(
                f"style file {path} has format {header['format']!r:.40}; this version reads format {FORMAT}: "
                "bake the style again, or update lsast"
            )
        on_error.pop_all()
    return descriptor, slots, header
