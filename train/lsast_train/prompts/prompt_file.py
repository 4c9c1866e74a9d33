"""The result of an inversion: ``NAME.prompts.safetensors``, which `lsast-export` bakes into a style.

Tensors, all float32: ``prompts`` [stages, 3, T, dim], the context of every stage and layer group. Where prompts pass a
text encoder there are also ``embeddings`` [K, tokens, dim], its input: the matrices P_k; ``prompts`` is its output, so
the encoder is not needed again. Other tensors, which earlier versions wrote, are not read.

The metadata is one JSON object under the key ``lsast``: several keys would be written in random order, and equal
prompts would give unequal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lsast_engines.bundle.bundle import PROMPTS
from lsast_engines.bundle.json_fields import read_object
from lsast_engines.bundle.style import style_name_faults
from lsast_engines.errors import StyleError, fault_list
from lsast_engines.files import replace_file

from ..base.projection import GROUPS
from ..options import Generator, Gradient, Layout, Variant
from .matrix_index import matrix_count

if TYPE_CHECKING:
    from ..base.base import Base
    from .prompt_space import PromptSpace

FORMAT = 2
"""Format number of prompt files."""

EXPORTED_FROM = "exported_from"
"""Key among the training facts of a base: fingerprints, separated by blanks, of the bases that it was made from by
rounding weights or by training its decoder on. What was learned on these fits it, too."""

_KEY = "lsast"
_KINDS = ("variant", "generator", "layout", "gradient")


@dataclass(frozen=True)
class _Header:
    """The metadata of a prompt file, beside its format."""

    name: str
    base: str
    variant: Variant
    generator: Generator
    layout: Layout
    gradient: Gradient
    meta: dict[str, str]
    sha256: str


@dataclass(frozen=True, eq=False)
class Prompts:
    """The learned prompts of a style, bound to one base.

    `StyleError` for parts that do not fit together, or values that are not finite; all faults at once.
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
        faults = style_name_faults(self.name)
        if self.layout == "overlap" and self.variant != "step+layer":
            faults.append(f"layout: found overlap with variant {self.variant!r}; expected it with step+layer only")
        for name, tensor in self.tensors().items():
            if tensor.dtype != torch.float32:
                faults.append(f"{name}: found {tensor.dtype}; expected torch.float32")
            elif not torch.isfinite(tensor).all():
                faults.append(f"{name}: found NaN or infinite values; expected finite ones")
        shape = tuple(self.prompts.shape)
        if len(shape) != 4 or shape[1] != len(GROUPS) or 0 in shape:
            faults.append(f"prompts: found shape {list(shape)}; expected [stages, {len(GROUPS)}, tokens, dim]")
        elif not faults and self.embeddings is not None:
            found = list(self.embeddings.shape)
            count = matrix_count(self.variant, self.generator, self.layout, shape[0])
            if len(found) != 3 or 0 in found or (found[0], found[2]) != (count, shape[3]):
                faults.append(f"embeddings: found shape {found}; expected [{count}, tokens, {shape[3]}]")
        return sorted(faults)


def save_prompts(prompts: Prompts, path: Path) -> None:
    """Write `prompts` to `path`, whole; equal prompts give equal bytes."""
    # safetensors refuses tensors that share memory, as imported matrices and embeddings do.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in prompts.tensors().items()}
    header = {
        "format": FORMAT,
        **{key: getattr(prompts, key) for key in ("name", "base", *_KINDS, "meta")},
        "sha256": _digest(tensors),
    }
    with replace_file(path) as handle:
        handle.write(save(tensors, {_KEY: json.dumps(header, sort_keys=True, ensure_ascii=False)}))


def find_prompts(name_or_path: str, bundle: Path | None = None) -> Path:
    """The prompt file of a style: a file; or ``runs/NAME/NAME.prompts.safetensors``, as `lsast-train` writes it; or a
    file of that name in the folder ``prompts`` of `bundle`. `StyleError` if there is none of these."""
    given, name = Path(name_or_path).expanduser(), f"{name_or_path}.prompts.safetensors"
    paths = [given, Path("runs", name_or_path, name), *([] if bundle is None else [bundle / PROMPTS / name])]
    for path in paths:
        if path.is_file():
            return path
    raise StyleError(
        f"found no prompts at {' or '.join(map(str, paths))}; expected a file NAME.prompts.safetensors: "
        "learn them with lsast-train --style NAME --images DIR, or name the file"
    )


def check_fingerprint(found: str, what: str, base: str, fingerprint: str, facts: Mapping[str, str]) -> None:
    """Raise `StyleError` for what was learned on another base.

    Args:
        found: fingerprint of the base that `what`, as the message calls it, was learned on.
        base, fingerprint, facts: of the base that it is for; the facts are from its manifest or its training.
    """
    if found not in (fingerprint, *facts.get(EXPORTED_FROM, "").split()):
        raise StyleError(
            f"{what} was learned on base {found[:12]}…; the base {base!r} is {fingerprint[:12]}…: train it again on "
            "this base, or name the base that it was trained on with --base"
        )


def load_prompts(path: Path, base: Base | None = None) -> Prompts:
    """Read a prompt file; with `base`, refuse prompts that were learned on another one.

    Raises:
        StyleError: not there, no prompt file, of another format, damaged (all faults at once), or of another base.
    """
    raw, tensors = _read(path)
    faults: list[str] = []
    known = {entry.name: raw[entry.name] for entry in fields(_Header) if entry.name in raw}
    header = read_object(_Header, known, "", faults)
    if "prompts" not in tensors:
        faults.append("prompts: missing tensor")
    if raw.get("sha256") != _digest(tensors):
        faults.append("tensors: found other values than were written (SHA-256 differs); train or copy the file again")
    if header is None or faults:
        raise StyleError(fault_list(f"prompt file {path} is damaged:", faults))
    kinds = (header.variant, header.generator, header.layout, header.gradient)
    try:
        prompts = Prompts(header.name, header.base, *kinds, tensors["prompts"], header.meta, tensors.get("embeddings"))
    except StyleError as error:
        raise StyleError(f"prompt file {path} is damaged: {error}") from error
    if base is not None:
        check_fingerprint(prompts.base, f"prompt file {path}", base.config.name, base.fingerprint, base.config.training)
    return prompts


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a prompt file of a format that is read."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError(path)
        with path.open("rb"), safe_open(str(path), "pt") as file:  # it calls an unreadable one missing
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


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
