"""Exponential moving average of weights."""

from __future__ import annotations

import torch
from torch import nn


def update_ema(ema: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Move every weight of `ema` towards `module`'s by 1 - min(decay, (1 + step) / (10 + step)).

    The shorter memory of the first steps is that of TensorFlow's ExponentialMovingAverage with ``num_updates``.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), share)


class Ema:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.shadow = nn.ParameterList(
            [nn.Parameter(p.detach().clone(), requires_grad=False) for p in module.parameters()]
        )

    def update(self, step: int) -> None:
        """See `update_ema`."""
        update_ema(self.shadow, self.module, self.decay, step)

    def swap(self) -> None:
        """Exchange live parameters and their average."""
        for live, shadow in zip(self.module.parameters(), self.shadow, strict=True):
            live.data, shadow.data = shadow.data, live.data
