"""What a distillation trains: the keys and values of a style in the U-Net, each stage for itself."""

from __future__ import annotations

import torch
from torch import nn

from ..base.kv_packing import KVLayout


class Student(nn.Module):
    """Keys and values init + scale · delta, of which delta is trained; those of ControlNet stay: they have no guidance.

    The scale is the root mean square of each layer's keys or values, so that one learning rate suits all layers.

    Args:
        kv_unet: [stages, T, Wu]: the style's.
        kv_control: [stages, T, Wc]: the style's.
        layout: of `kv_unet`.
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
