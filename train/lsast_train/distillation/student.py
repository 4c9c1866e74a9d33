"""What a distillation trains: a style's keys and values, or the prompts behind them, each stage for itself.

Parameters are deltas from an initial value, in units of its root mean square (of each layer's keys and values; of the
prompts), so that one learning rate suits all layers and weight decay leads back to the start.
"""

from __future__ import annotations

import torch
from torch import nn

from ..base.attention import GROUPS
from ..base.kv_packing import KVLayout

Rows = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of U-Net [T, Wu] and ControlNet [T, Wc]."""


class KeyValueStudent(nn.Module):
    """Trains the U-Net's keys and values; ControlNet's stay, for no guidance is applied to them.

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

    def rows(self, stage: int) -> Rows:
        """Keys and values of both networks in this stage."""
        return self.init[stage] + self.scale * self.delta[stage], self.control[stage]

    @torch.no_grad()
    def kv_unet(self) -> torch.Tensor:
        """[stages, T, Wu], without gradient."""
        return torch.stack([self.rows(stage)[0] for stage in range(len(self.delta))])


class PromptStudent(nn.Module):
    """Trains the prompts of every stage and layer group, from which keys and values of both networks follow.

    Args:
        prompts: [stages, 3, T, dim]: the style's.
        unet, control: layouts of the networks, which project the prompts.
    """

    init: torch.Tensor
    scale: torch.Tensor

    def __init__(self, prompts: torch.Tensor, unet: KVLayout, control: KVLayout) -> None:
        super().__init__()
        self._layouts = unet, control
        self.register_buffer("init", prompts.clone())
        scale = prompts.square().mean((0, 2, 3)).sqrt().view(len(GROUPS), 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.delta = nn.ParameterList(torch.zeros_like(contexts) for contexts in prompts)

    def contexts(self, stage: int) -> torch.Tensor:
        """[3, T, dim]."""
        contexts: torch.Tensor = self.init[stage] + self.scale * self.delta[stage]
        return contexts

    def rows(self, stage: int) -> Rows:
        """Keys and values of both networks in this stage."""
        contexts = self.contexts(stage)[None]
        unet, control = (layout.project(contexts)[0] for layout in self._layouts)
        return unet, control

    @torch.no_grad()
    def prompts(self) -> torch.Tensor:
        """[stages, 3, T, dim], without gradient."""
        return torch.stack([self.contexts(stage) for stage in range(len(self.delta))])
