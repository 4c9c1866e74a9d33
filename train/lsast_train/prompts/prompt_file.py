"""The result of an inversion: ``NAME.prompts.safetensors``, which `lsast-export` bakes into a style.

Tensors, all float32: ``prompts`` [stages, 3, T, dim], the context of every stage and layer group. Where prompts pass a
text encoder there are also ``embeddings`` [K, tokens, dim], its input: the matrices P_k; ``prompts`` is its output, so
the encoder is not needed again. A file may also hold ``embeddings`` alone, bound to no base yet (`UnboundPrompts`).
Other tensors, which earlier versions wrote, are not read.

The metadata is one JSON object under the key ``lsast``: several keys would be written in random order, and equal
prompts would give unequal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lsast_engines.bundle.bundle import PROMPTS
from lsast_engines.bundle.style import style_name_faults
from lsast_engines.errors import StyleError, UsageError, fault_list
from lsast_engines.files import replace_file

from ..base.attention import GROUPS
from ..base.base import Base
from ..base.lazy_base import check_fingerprint
from ..options import Generator, Gradient, Layout, Variant
from .prompt_space import STAGES, PromptSpace, matrix_count, matrix_index
from .text_encoder import PlaceholderEncoder

FORMAT = 2
"""Format number of prompt files."""

_KEY = "lsast"
_KIND = {"variant": Variant, "generator": Generator, "layout": Layout, "gradient": Gradient}


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
    """[stages, 3, T, dim], groups in the order of `GROUPS`."""
    meta: dict[str, str] = field(default_factory=dict)
    """Licence and how it was trained; kept, not interpreted."""
    embeddings: torch.Tensor | None = None
    """[K, tokens, dim]: the matrices P_k, where prompts pass a text encoder."""

    def __post_init__(self) -> None:
        if faults := self._faults():
            raise StyleError(fault_list(f"the prompts of {self.name!r} are not usable:", faults))

    @classmethod
    def of(cls, space: PromptSpace, name: str, base: str, meta: Mapping[str, str]) -> Prompts:
        """The current prompts of `space`, without dropout, copied to the CPU."""
        with torch.no_grad():
            prompts = space.prompts().cpu().clone()
            embeddings = None if space.text is None else space.embeddings().cpu().clone()
        kind = (space.variant, space.generator, space.layout, space.gradient)
        return cls(name, base, *kind, prompts, dict(meta), embeddings)

    @property
    def prompt(self) -> Literal["context", "text"]:
        """Whether the matrices are the contexts, or passed a text encoder."""
        return "context" if self.embeddings is None else "text"

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the file, by name."""
        return {"prompts": self.prompts} | ({} if self.embeddings is None else {"embeddings": self.embeddings})

    def _faults(self) -> list[str]:
        faults = _shared_faults(self)
        shape = tuple(self.prompts.shape)
        if len(shape) != 4 or shape[1] != len(GROUPS) or 0 in shape:
            faults.append(f"prompts: found shape {list(shape)}; expected [stages, {len(GROUPS)}, tokens, dim]")
        elif not faults and self.embeddings is not None:
            faults += _embedding_faults(self, self.embeddings, shape[0], shape[3])
        return sorted(faults + _infinite(self.tensors()))


@dataclass(frozen=True, eq=False)
class UnboundPrompts:
    """Embeddings of the placeholder without a base: a base with a fitting text encoder makes prompts of them (`bind`).

    Raises:
        StyleError: parts that do not fit together, or values that are not finite; all faults at once.
    """

    name: str
    variant: Variant
    generator: Generator
    layout: Layout
    gradient: Gradient
    embeddings: torch.Tensor
    """[K, tokens, dim]."""
    stages: int = STAGES
    """Equal parts of the noise schedule."""
    meta: dict[str, str] = field(default_factory=dict)
    """Licence and how it was trained; kept, not interpreted."""

    def __post_init__(self) -> None:
        faults = _shared_faults(self) or _embedding_faults(self, self.embeddings, self.stages)
        if faults := sorted(faults + _infinite(self.tensors())):
            raise StyleError(fault_list(f"the embeddings of {self.name!r} are not usable:", faults))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the file, by name."""
        return {"embeddings": self.embeddings}

    def bind(self, text: PlaceholderEncoder, base: str) -> Prompts:
        """The prompts of the embeddings on the base with the fingerprint `base` and the text encoder `text`.

        Raises:
            StyleError: the encoder takes embeddings of another size.
        """
        table = matrix_index(self.variant, self.layout, self.stages)
        used, where = table.unique(return_inverse=True)
        try:
            with torch.no_grad():
                prompts = text.contexts(self.embeddings[used]).cpu()[where]
        except UsageError as error:
            raise StyleError(f"the embeddings of {self.name!r} do not fit the base: {error}") from error
        kind = (self.variant, self.generator, self.layout, self.gradient)
        return Prompts(self.name, base, *kind, prompts, self.meta, self.embeddings)


def _shared_faults(prompts: Prompts | UnboundPrompts) -> list[str]:
    faults = style_name_faults(prompts.name)
    for name, kind in _KIND.items():
        if (found := getattr(prompts, name)) not in get_args(kind):
            faults.append(f"{name}: found {found!r}; expected one of {', '.join(get_args(kind))}")
    if prompts.layout == "overlap" and prompts.variant != "step+layer":
        faults.append(f"layout: found overlap with variant {prompts.variant!r}; expected it with step+layer only")
    return faults + [
        f"{name}: found {tensor.dtype}; expected torch.float32"
        for name, tensor in prompts.tensors().items()
        if tensor.dtype != torch.float32
    ]


def _embedding_faults(
    prompts: Prompts | UnboundPrompts, embeddings: torch.Tensor, stages: int, dim: int | None = None
) -> list[str]:
    shape = tuple(embeddings.shape)
    count = matrix_count(prompts.variant, prompts.generator, prompts.layout, stages)
    if len(shape) == 3 and shape[0] == count and 0 not in shape and dim in (None, shape[2]):
        return []
    return [f"embeddings: found shape {list(shape)}; expected [{count}, tokens, {dim or 'dim'}]"]


def _infinite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [
        f"{name}: found NaN or infinite values; expected finite ones"
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float32 and not torch.isfinite(tensor).all()
    ]


def save_prompts(prompts: Prompts | UnboundPrompts, path: Path) -> None:
    """Write `prompts` to `path`, whole; equal prompts give equal bytes."""
    # safetensors refuses tensors that share memory, as imported matrices and embeddings do.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in prompts.tensors().items()}
    header = {
        "format": FORMAT,
        **{key: getattr(prompts, key) for key in ("name", *_KIND, "meta")},
        "sha256": _digest(tensors),
    }
    header |= {"base": prompts.base} if isinstance(prompts, Prompts) else {"stages": prompts.stages}
    with replace_file(path) as handle:
        handle.write(save(tensors, {_KEY: json.dumps(header, sort_keys=True, ensure_ascii=False)}))


def find_prompts(name_or_path: str, bundle: Path | None = None) -> Path:
    """The prompt file of a style.

    It is a file; or ``runs/NAME/NAME.prompts.safetensors``, as `lsast-train` writes it; or a file of that name in the
    folder ``prompts`` of `bundle`.

    Raises:
        StyleError: there is none of these.
    """
    given, name = Path(name_or_path).expanduser(), f"{name_or_path}.prompts.safetensors"
    paths = [given, Path("runs", name_or_path, name), *([] if bundle is None else [bundle / PROMPTS / name])]
    for path in paths:
        if path.is_file():
            return path
    raise StyleError(
        f"found no prompts at {' or '.join(map(str, paths))}; expected a file NAME.prompts.safetensors: "
        "learn them with lsast-train --style NAME --images DIR, or name the file"
    )


def load_prompts(path: Path, base: Base | None = None) -> Prompts:
    """Read a prompt file; with `base`, refuse prompts that were learned on another one.

    Raises:
        StyleError: not there, no prompt file, of another format, damaged (all faults at once), of another base, or
            bound to none.
    """
    prompts = load_any_prompts(path)
    if isinstance(prompts, UnboundPrompts):
        raise StyleError(
            f"prompt file {path} holds embeddings that are bound to no base; bind them with: "
            f"lsast-export import {path} --base BASE, a base with a text encoder"
        )
    if base is not None:
        check_fingerprint(prompts.base, f"prompt file {path}", base.config.name, base.fingerprint, base.config.training)
    return prompts


def load_any_prompts(path: Path) -> Prompts | UnboundPrompts:
    """Read a prompt file, bound to a base or not.

    Raises:
        StyleError: not there, no prompt file, of another format, or damaged (all faults at once).
    """
    header, tensors = _read(path)
    bound = "base" in header
    faults = _header_faults(header, bound)
    required = "prompts" if bound else "embeddings"
    faults += [f"{required}: missing tensor"] if required not in tensors else []
    if header.get("sha256") != _digest(tensors):
        faults.append("tensors: found other values than were written (SHA-256 differs); train or copy the file again")
    if faults:
        raise StyleError(fault_list(f"prompt file {path} is damaged:", faults))
    kind = (header["variant"], header["generator"], header["layout"], header["gradient"])
    name, meta, embeddings = header["name"], header["meta"], tensors.get("embeddings")
    try:
        if bound:
            return Prompts(name, header["base"], *kind, tensors["prompts"], meta, embeddings)
        return UnboundPrompts(name, *kind, tensors["embeddings"], header["stages"], meta)
    except StyleError as error:
        raise StyleError(f"prompt file {path} is damaged: {error}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a prompt file of a format that is read."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError(path)
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
    return header, tensors


def _header_faults(header: dict[str, Any], bound: bool) -> list[str]:
    texts = ("name", *(["base"] if bound else []), *_KIND, "sha256")
    faults = [
        f"{key}: found {header.get(key)!r}; expected text" for key in texts if not isinstance(header.get(key), str)
    ]
    stages = header.get("stages")
    if not bound and (not isinstance(stages, int) or isinstance(stages, bool) or stages < 1):
        faults.append(f"stages: found {stages!r}; expected a whole number of at least 1")
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
