"""The style that is distilled: its keys and values, from a style file or projected from a prompt file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.manifest import MANIFEST
from lsast_engines.bundle.style import DISTILLED_GUIDANCE_KEY, StyleFile
from lsast_engines.errors import StyleError

from ..base.attention import GROUPS
from ..base.base import Base
from ..base.kv_packing import KVLayout, kv_layouts
from ..base.lazy_base import check_fingerprint
from ..prompts.prompt_file import load_prompts


@dataclass(frozen=True, eq=False)
class SourceStyle:
    """A style as keys and values, float32 on the CPU."""

    name: str
    kv_unet: torch.Tensor
    """[stages, T, Wu]"""
    kv_control: torch.Tensor
    """[stages, T, Wc]"""
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> int:
        """Equal parts of the noise schedule."""
        return len(self.kv_unet)


def find_style(name_or_path: str, folder: Path | None) -> Path:
    """The style file or prompt file of a style.

    Args:
        name_or_path: a file; or the name of a style of the base's bundle, or of a run of `lsast-train`.
        folder: the base's folder; None for a base without one.

    Raises:
        StyleError: there is no such style.
    """
    given = Path(name_or_path).expanduser()
    run = Path("runs", name_or_path, f"{name_or_path}.prompts.safetensors")
    bundle = folder is not None and (folder / MANIFEST).is_file()
    styles = Bundle.open(folder, verify_hashes=False).styles() if folder is not None and bundle else {}
    for path in (given, styles.get(name_or_path), run):
        if path is not None and path.is_file():
            return path
    raise StyleError(
        f"found no style {name_or_path!r}: no such file, no {run}, and {folder or 'the base'} has "
        f"{', '.join(styles) or 'no styles'}; expected one of these"
    )


def read_source(path: Path, base: Base) -> SourceStyle:
    """Read a style file or a prompt file that belongs to `base`.

    Raises:
        StyleError: damaged, of another base, or with guidance baked in already.
    """
    if path.name.endswith(".prompts.safetensors"):
        found = load_prompts(path, base)
        kv_unet, kv_control = (_project(layout, found.prompts) for layout in kv_layouts(base))
        meta = {**{key: str(getattr(found, key)) for key in ("variant", "layout", "prompt")}, **found.meta}
        return SourceStyle(found.name, kv_unet, kv_control, meta)
    style = StyleFile(path).load()
    check_fingerprint(style.base, f"style file {path}", base.config.name, base.fingerprint, base.config.training)
    if (scale := style.meta.get(DISTILLED_GUIDANCE_KEY)) is not None:
        raise StyleError(f"{path} has guidance {scale} baked in already; expected the style that it was distilled from")
    return SourceStyle(
        style.name, torch.from_numpy(style.kv_unet), torch.from_numpy(style.kv_control), dict(style.meta)
    )


def null_rows(base: Base) -> torch.Tensor:
    """Keys and values [T, Wu] of the base's null context in the U-Net, on the CPU."""
    context = base.null_context.float().expand(1, len(GROUPS), -1, -1)
    return _project(kv_layouts(base)[0], context)[0]


@torch.no_grad()
def _project(layout: KVLayout, prompts: torch.Tensor) -> torch.Tensor:
    weight = layout.layers[0].module.to_k.weight
    return layout.project(prompts.to(weight)).float().cpu()
