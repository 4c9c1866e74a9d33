"""What a distillation trains, the keys and values of a style in the U-Net, and the style that becomes of them."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from torch import nn

from lsast_engines.bundle.style import DISTILLED_GUIDANCE_KEY, Style, decode_defaults, encode_defaults
from lsast_engines.errors import UsageError, fault_list

from ..base.kv_packing import KVLayout
from ..training.run_files import versions
from .options import DistillOptions
from .source_style import SourceStyle


class Student(nn.Module):
    """Keys and values init + scale · delta, of which delta is trained; those of ControlNet stay: they have no guidance.

    The scale is the root mean square of each layer's keys or values, so that one learning rate suits all layers.

    Args:
        kv_unet: [stages, T, Wu]: the style's.
        kv_control: [stages, T, Wc]: the style's.
    """

    init: torch.Tensor
    control: torch.Tensor
    scale: torch.Tensor

    def __init__(self, kv_unet: torch.Tensor, kv_control: torch.Tensor, layout: KVLayout) -> None:
        super().__init__()
        self.register_buffer("init", kv_unet.clone())
        self.register_buffer("control", kv_control, persistent=False)
        scale = torch.ones(layout.width)
        for entry in layout.entries:
            for offset in (entry.offset, entry.offset + entry.width):
                columns = slice(offset, offset + entry.width)
                scale[columns] = kv_unet[:, :, columns].square().mean().sqrt()
        self.register_buffer("scale", scale, persistent=False)
        self.delta = nn.ParameterList(torch.zeros_like(rows) for rows in kv_unet)

    def rows(self, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of U-Net [T, Wu] and ControlNet [T, Wc] in this stage."""
        return self.init[stage] + self.scale * self.delta[stage], self.control[stage]

    @torch.no_grad()
    def kv_unet(self) -> torch.Tensor:
        """[stages, T, Wu], without gradient."""
        return torch.stack([self.rows(stage)[0] for stage in range(len(self.delta))])


def distilled_meta(
    style: SourceStyle, options: DistillOptions, relative: float, step: int, pictures: str
) -> dict[str, str]:
    """The metadata of a distilled style: that of the original, whose default guidance is baked in instead.

    Raises:
        UsageError: invalid defaults of the original.
    """
    defaults, faults = decode_defaults(style.meta)
    if faults:
        raise UsageError(fault_list(f"style {style.name!r} has invalid defaults:", faults))
    defaults.pop("guidance", None)
    return {
        **{key: value for key, value in style.meta.items() if key != "defaults"},
        **encode_defaults(defaults),
        DISTILLED_GUIDANCE_KEY: f"{options.guidance:g}",
        "distilled_from": style.name,
        "distill_options": json.dumps(asdict(options), sort_keys=True),
        "distill_images_sha256": pictures,
        "distill_step": str(step),
        "distill_relative_error": f"{relative:.6f}",
        "distill_versions": json.dumps(versions()),
    }


def distilled_style(student: Student, source: SourceStyle, name: str, base: str, meta: dict[str, str]) -> Style:
    """The style `name` of the base with the fingerprint `base` that `student`, trained from `source`, has become."""
    kv_unet = student.kv_unet().cpu().numpy()
    return Style(name, base, len(kv_unet), kv_unet.shape[1], kv_unet, source.kv_control.numpy(), meta)
