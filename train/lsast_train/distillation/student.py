"""What a distillation trains, the keys and values of a style in the U-Net, and the metadata of the result."""

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


class Student(nn.Module):
    """Keys and values init + scale · delta, of which delta is trained; those of ControlNet stay: they have no guidance.

    The scale is the root mean square of each layer's keys or values, so that one learning rate suits all layers.

    Args:
        layout: of the U-Net's keys and values.
    """

    init: torch.Tensor
    control: torch.Tensor
    scale: torch.Tensor

    def __init__(self, style: Style, layout: KVLayout) -> None:
        super().__init__()
        kv_unet = torch.from_numpy(style.kv_unet)
        self.register_buffer("init", kv_unet.clone())
        self.register_buffer("control", torch.from_numpy(style.kv_control), persistent=False)
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


def distilled_meta(style: Style, options: DistillOptions, relative: float, step: int, pictures: str) -> dict[str, str]:
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
