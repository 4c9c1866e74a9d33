"""The style that is distilled, read from prompts or from keys and values; each gives the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.manifest import MANIFEST
from lsast_engines.bundle.style import StyleFile
from lsast_engines.errors import StyleError

from ..base.attention import GROUPS
from ..base.base import Base
from ..base.kv_packing import KVLayout, kv_layouts
from ..base.lazy_base import check_fingerprint
from ..prompts.prompt_file import load_prompts
from .options import Kind

MAX_RESIDUAL = 0.01
"""Part of the keys and values, by norm, that prompts recovered from them may leave unexplained."""


@dataclass(frozen=True, eq=False)
class SourceStyle:
    """A style as keys and values and, if asked for, as prompts; tensors are float32 on the CPU."""

    name: str
    kv_unet: torch.Tensor
    """[stages, T, Wu]"""
    kv_control: torch.Tensor
    """[stages, T, Wc]"""
    prompts: torch.Tensor | None = None
    """[stages, 3, T, dim], of `kind` prompts only."""
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> int:
        """Equal parts of the noise schedule."""
        return len(self.kv_unet)


def find_style(name_or_path: str, folder: Path | None, kind: Kind) -> Path:
    """The file of a style: a style file or a prompt file.

    Args:
        name_or_path: a file; or the name of a style of the base's bundle, or of a run of `lsast-train`.
        folder: the base's folder; None for a base without one.
        kind: ``prompts`` prefers the run, ``kv`` the bundle's style.

    Raises:
        StyleError: there is no such style.
    """
    given = Path(name_or_path).expanduser()
    if given.is_file():
        return given
    run = Path("runs", name_or_path, f"{name_or_path}.prompts.safetensors")
    bundle = folder is not None and (folder / MANIFEST).is_file()
    styles = Bundle.open(folder, verify_hashes=False).styles() if folder is not None and bundle else {}
    places = [path for path in (styles.get(name_or_path), run if run.is_file() else None) if path is not None]
    if not places:
        raise StyleError(
            f"found no style {name_or_path!r}: no such file, no {run}, and {folder or 'the base'} has "
            f"{', '.join(styles) or 'no styles'}; expected one of these"
        )
    return places[-1 if kind == "prompts" else 0]


def read_source(path: Path, base: Base, kind: Kind) -> SourceStyle:
    """Read a style file or a prompt file that belongs to `base`.

    Raises:
        StyleError: damaged, of another base, with guidance baked in already, or keys and values that no prompts give.
    """
    layouts = kv_layouts(base)
    if path.name.endswith(".prompts.safetensors"):
        found = load_prompts(path)
        if found.base not in base.config.training.get("exported_from", "").split():
            check_fingerprint(found.base, base, f"prompt file {path}")
        _refuse_baked(found.meta, path)
        kv_unet, kv_control = (_project(layout, found.prompts) for layout in layouts)
        prompts = found.prompts if kind == "prompts" else None
        meta = {**{key: str(getattr(found, key)) for key in ("variant", "layout", "prompt")}, **found.meta}
        return SourceStyle(found.name, kv_unet, kv_control, prompts, meta)
    style = StyleFile(path).load()
    check_fingerprint(style.base, base, f"style file {path}")
    _refuse_baked(style.meta, path)
    kv_unet, kv_control = torch.from_numpy(style.kv_unet), torch.from_numpy(style.kv_control)
    prompts = recover_prompts(layouts, kv_unet, kv_control, str(path)) if kind == "prompts" else None
    return SourceStyle(style.name, kv_unet, kv_control, prompts, dict(style.meta))


def null_rows(base: Base) -> torch.Tensor:
    """Keys and values [T, Wu] of the base's null context in the U-Net, on the CPU."""
    context = base.null_context.float().expand(1, len(GROUPS), -1, -1)
    return _project(kv_layouts(base)[0], context)[0]


@torch.no_grad()
def recover_prompts(
    layouts: tuple[KVLayout, ...], kv_unet: torch.Tensor, kv_control: torch.Tensor, what: str
) -> torch.Tensor:
    """The prompts [stages, 3, T, dim] that keys and values were projected from, by least squares.

    Every layer of a group sees the same context c, as W c; the layers together have many more rows than c.

    Raises:
        StyleError: no prompts give these keys and values.
    """
    prompts = []
    for group in GROUPS:
        weights, rows = [], []
        for layout, packed in zip(layouts, (kv_unet, kv_control), strict=True):
            for layer, entry in zip(layout.layers, layout.entries, strict=True):
                if layer.group == group:
                    weights += [layer.module.to_k.weight, layer.module.to_v.weight]
                    rows.append(packed[:, :, entry.offset : entry.offset + 2 * entry.width])
        matrix = torch.cat(weights).double().cpu()  # [rows, dim]
        known = torch.cat(rows, dim=2).double().flatten(0, 1).T  # [rows, stages · T]
        solved = torch.linalg.lstsq(matrix, known).solution
        left = ((matrix @ solved - known).norm() / known.norm()).item()
        if not left <= MAX_RESIDUAL:
            raise StyleError(
                f"{what}: no prompts give its keys and values ({left:.1%} of group {group} is left over); expected a "
                "style that was baked from prompts: take kind kv, or the prompt file"
            )
        prompts.append(solved.T.unflatten(0, kv_unet.shape[:2]))
    return torch.stack(prompts, dim=1).float()


@torch.no_grad()
def _project(layout: KVLayout, prompts: torch.Tensor) -> torch.Tensor:
    weight = layout.layers[0].module.to_k.weight
    return layout.project(prompts.to(weight)).float().cpu()


def _refuse_baked(meta: Mapping[str, str], path: Path) -> None:
    if (scale := meta.get("guidance_baked")) is not None:
        raise StyleError(f"{path} has guidance {scale} baked in already; expected the style that it was distilled from")
