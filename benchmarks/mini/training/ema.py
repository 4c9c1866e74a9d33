"""The exponential moving average of weights."""

import torch
from torch import nn


def update_ema(ema: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Move every weight of `ema` towards `module`'s by 1 - min(decay, (1 + step) / (10 + step)).

    The shorter memory of the first steps is that of TensorFlow's ExponentialMovingAverage with ``num_updates``.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), share)
