"""How far paintings are from an artist's works as a distribution, and from the pictures that they are of.

- *Style*: energy distance (Székely & Rizzo 2013, eq. 1) between the paintings' and the works' channel means and
  deviations on the features of `LiteDistance`, whose network no judge of the evaluation uses. Distances of whole
  distributions ask no painting to look like one work.
- *Content*: difference of the self-similarities of deep features, as in STROTSS (Kolkin et al. 2019, section 3.2):
  what was alike in the picture stays alike, in any colour.
- *Roughness*: mean gradient of the flattest and of the busiest quarter of the blocks, so that no pattern lies over
  skies and walls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from lsast_engines.images import import_opencv

from ..mini.perceptual import LiteDistance

TAP_WEIGHTS = (0.5, 1.0, 1.0, 1.0)
"""Weights of the style loss at 1/2, 1/4, 1/8 and 1/16 of the size."""

REMEMBERED = 24
"""The last paintings that count as the distribution of the present ones. Many would be of prompts long left."""

REMEMBERED_ROUGHNESS = 4
"""The same for roughness, whose mean is driven to one value: an old mean drives it beyond and back."""

_BLOCK = 16
"""Side in pixels of the blocks whose gradient is measured."""


@dataclass(frozen=True)
class Distances:
    """Losses of a batch of paintings, scalars."""

    style: torch.Tensor
    content: torch.Tensor
    roughness: torch.Tensor


class StyleLoss(nn.Module):
    """Losses of paintings after the works of one artist. The last paintings are buffers, so a checkpoint holds them.

    Args:
        works: crops of the works [N, size, size, 3] as large as the paintings will be.
        whole: the works as a whole, at the size that the base paints at, for roughness.
        device: where it runs.
    """

    def __init__(
        self, works: npt.NDArray[np.uint8], whole: Sequence[npt.NDArray[np.uint8]], device: torch.device
    ) -> None:
        super().__init__()
        self._lite = LiteDistance(device)
        with torch.no_grad():
            described = zip(
                *(self.describe(self.features(part)) for part in _images(works).to(device).split(8)), strict=True
            )
            taps = [torch.cat(parts) for parts in described]
            rough = [roughness(_images(picture[None]).to(device)) for picture in whole]
        self._mean = [tap.mean(0) for tap in taps]
        self._std = [tap.std(0) + 1e-3 for tap in taps]
        self._works = [(tap - mean) / std for tap, mean, std in zip(taps, self._mean, self._std, strict=True)]
        levels = torch.cat(rough)
        self._rough_mean, self._rough_std = levels.mean(0), levels.std(0) + 1e-3
        # A row for each remembered painting: what `describe` gives of each tap, then `roughness`.
        self._widths = [*(tap.shape[1] for tap in taps), 2]
        self.past: torch.Tensor
        self.register_buffer("past", torch.zeros(REMEMBERED, sum(self._widths), device=device))
        self.filled: torch.Tensor
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images [B, 3, H, W] in [-1, 1] → the taps of `LiteDistance`."""
        return self._lite.features(images)

    @staticmethod
    def describe(taps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Taps [B, C, h, w] → mean and deviation of each channel, [B, 2C]."""
        return [torch.cat([x.mean((2, 3)), (x.var((2, 3)) + 1e-5).sqrt()], 1) for x in (tap.float() for tap in taps)]

    def forward(self, images: torch.Tensor, content: list[torch.Tensor], remember: bool = True) -> Distances:
        """The losses of paintings.

        Args:
            images: [B, 3, H, W] in [-1, 1], B at least 2.
            content: `self_similarities` of the pictures that they are of.
            remember: count earlier paintings to the distribution, and these to that of later ones.
        """
        taps = self.features(images)
        described = [
            (tap - mean) / std for tap, mean, std in zip(self.describe(taps), self._mean, self._std, strict=True)
        ]
        *past, past_levels = self.past[: int(self.filled) * remember].split(self._widths, 1)
        parts = [
            weight * energy_distance(*rows)
            for weight, *rows in zip(TAP_WEIGHTS, described, past, self._works, strict=True)
        ]
        alike = [(new - old).abs().mean() for new, old in zip(self_similarities(taps), content, strict=True)]
        levels = roughness(images)
        # The mean over all that is remembered, with the gradient of the mean over these alone.
        mean = torch.cat([levels.detach(), past_levels[:REMEMBERED_ROUGHNESS]]).mean(0)
        mean = mean + levels.mean(0) - levels.mean(0).detach()
        if remember:
            new = torch.cat([*described, levels], 1).detach()
            self.past.copy_(torch.cat([new, self.past])[:REMEMBERED])
            self.filled.add_(len(new)).clamp_(max=REMEMBERED)
        rough = ((mean - self._rough_mean) / self._rough_std).square().sum()
        return Distances(torch.stack(parts).sum() / sum(TAP_WEIGHTS), torch.stack(alike).mean(), rough)


def energy_distance(rows: torch.Tensor, past: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """2 E|x - y| - E|x - x'| for x in `rows` [B, D], x' in `rows` and `past`, y in `others`, relative to √D.

    The part that depends on `others` alone is left out. Gradients go to `rows` as x alone.
    """
    same = torch.cat([rows.detach(), past])
    apart = torch.cdist(rows, same).sum() / (len(rows) * (len(same) - 1))
    return (2 * torch.cdist(rows, others).mean() - apart) / math.sqrt(rows.shape[1])


def self_similarities(taps: list[torch.Tensor]) -> list[torch.Tensor]:
    """Cosine distances of all pairs of positions in the two deepest taps, relative to the mean of a row, [B, N, N]."""
    found = []
    for tap in taps[2:]:
        rows = F.avg_pool2d(tap.float(), max(1, tap.shape[2] // 16)).flatten(2)
        rows = F.normalize(rows - rows.mean(2, keepdim=True), dim=1)
        distance = 1 - rows.transpose(1, 2) @ rows
        found.append(distance / distance.mean(2, keepdim=True).clamp(min=1e-4))
    return found


def roughness(images: torch.Tensor) -> torch.Tensor:
    """Logarithm of the mean gradient of luminance in the flattest and in the busiest quarter of the blocks, [B, 2]."""
    luma = (images.float() * torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]).sum(1)
    across, down = luma.diff(dim=2)[:, :-1], luma.diff(dim=1)[:, :, :-1]
    gradient = (across.square() + down.square() + 1e-8).sqrt()
    blocks = F.avg_pool2d(gradient[:, None], _BLOCK).flatten(1).sort(1).values
    quarter = max(1, blocks.shape[1] // 4)
    return torch.stack([blocks[:, :quarter].mean(1), blocks[:, -quarter:].mean(1)], 1).log()


def fitted(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """A picture [H, W, 3] at an area of about side² pixels."""
    cv2 = import_opencv()
    height, width = pixels.shape[:2]
    scale = side / math.sqrt(height * width)
    size = (max(round(width * scale), 2 * _BLOCK), max(round(height * scale), 2 * _BLOCK))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _images(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Pixels [B, H, W, 3] → images [B, 3, H, W] in [-1, 1], channels-last."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)
