"""How far paintings are from an artist's works as a distribution, and from the pictures that they are of.

- *Style*: energy distance (Székely & Rizzo 2013, eq. 1) between the features of the paintings and of the works. These
  are means and deviations of the channels of the taps of `LiteDistance`, and its pooled features, at full and at half
  size; lsast-eval does not use this network. The `roughness` is compared, too: without it a pattern appears on skies
  and walls. Whole distributions are compared, so that no painting has to look like one work.
- *Content*: difference of the self-similarities of deep features, as in STROTSS (Kolkin et al. 2019, section 3.2):
  what was alike in the picture stays alike, in any colour.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..paintings import Painting, random_crop, to_images
from ..training.rng import RngStream, rng_for
from .perceptual import LiteDistance

VIEW_WEIGHTS = (0.5, 1.0, 1.0, 1.0, 2.0)
"""Weights of the taps at 1/2, 1/4, 1/8 and 1/16 of the size, and of the pooled features."""

WEIGHTS = (*VIEW_WEIGHTS, *VIEW_WEIGHTS, 2.2)
"""Weights of the style loss: of the pictures, of the same at half the size, and of the roughness."""

WORKS = 160
"""Crops of the artist's works that stand for all."""

REMEMBERED = 24
"""How many of the last paintings count as samples of the present distribution: older ones were painted with other
prompts."""

_BLOCK = 16
"""Side in pixels of the blocks whose gradient is measured."""


@dataclass(frozen=True)
class Distances:
    """Losses of a batch of paintings, scalars."""

    style: torch.Tensor
    content: torch.Tensor

    def total(self, content_weight: float) -> torch.Tensor:
        """What is minimised."""
        return self.style + content_weight * self.content


class StyleLoss(nn.Module):
    """Losses of paintings after the works of one artist. The last paintings are buffers, so a checkpoint holds them.

    `WORKS` crops of the paintings' `size` in pixels stand for all works, each in its turn.
    """

    def __init__(self, works: Sequence[Painting], size: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self._lite = LiteDistance(device)
        generator, works = rng_for(seed, RngStream.TRAINING_CROPS), works[:WORKS]
        crops = np.stack([random_crop(works[index % len(works)], size, generator) for index in range(WORKS)])
        with torch.no_grad():
            images = to_images(torch.from_numpy(crops), device)
            parts = [self._describe(part, self._lite.features(part)) for part in images.split(8)]
            described = [torch.cat(rows) for rows in zip(*parts, strict=True)]
        self._mean = [rows.mean(0) for rows in described]
        self._std = [rows.std(0) + 1e-3 for rows in described]
        self._works = self._standardised(described)
        # A row for each remembered painting: all that `_describe` gives.
        self._widths = [rows.shape[1] for rows in described]
        self.past: torch.Tensor
        self.register_buffer("past", torch.zeros(REMEMBERED, sum(self._widths), device=device))
        self.filled: torch.Tensor
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def _describe(self, images: torch.Tensor, taps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Images and their taps → rows [B, D] for each of `WEIGHTS`."""
        found = []
        for view in (taps, self._lite.features(F.avg_pool2d(images, 2))):
            for x in (tap.float() for tap in view):
                found.append(torch.cat([x.mean((2, 3)), (x.var((2, 3)) + 1e-5).sqrt()], 1))
            found.append(self._lite.pooled(view).float())
        return [*found, roughness(images)]

    def _standardised(self, described: list[torch.Tensor]) -> list[torch.Tensor]:
        """Rows in standard deviations of the works from their mean."""
        return [(rows - mean) / std for rows, mean, std in zip(described, self._mean, self._std, strict=True)]

    def forward(self, images: torch.Tensor, pictures: torch.Tensor, remember: bool = True) -> Distances:
        """The losses of paintings `images` [B, 3, H, W] in [-1, 1], B at least 2, of `pictures`, likewise.

        With `remember`, earlier paintings count to the distribution, and these to that of later ones.
        """
        with torch.no_grad():
            content = self_similarities(self._lite.features(pictures))
        taps = self._lite.features(images)
        described = self._standardised(self._describe(images, taps))
        past = self.past[: int(self.filled) * remember].split(self._widths, 1)
        distances = [energy_distance(*rows) for rows in zip(described, past, self._works, strict=True)]
        style = torch.stack([weight * distance for weight, distance in zip(WEIGHTS, distances, strict=True)]).sum()
        alike = [(new - old).abs().mean() for new, old in zip(self_similarities(taps), content, strict=True)]
        if remember:
            self.past.copy_(torch.cat([torch.cat(described, 1).detach(), self.past])[:REMEMBERED])
            self.filled.add_(len(images)).clamp_(max=REMEMBERED)
        return Distances(style / sum(WEIGHTS), torch.stack(alike).mean())


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
    """Logarithm of the mean gradient in the flattest and in the busiest quarter of the blocks, [B, 8].

    In this order: of luminance, then of what is left of the colours without it; each of the images [B, 3, H, W] and of
    the same at a quarter of the size; each of the flattest quarter, then of the busiest.
    """
    images = images.float()
    luma = (images * torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]).sum(1, keepdim=True)
    found = []
    for part, scale in itertools.product((luma, images - luma), (1, 4)):
        x = F.avg_pool2d(part, scale)
        across, down = x.diff(dim=3)[:, :, :-1], x.diff(dim=2)[..., :-1]
        gradient = (across.square() + down.square()).sum(1, keepdim=True).add(1e-8).sqrt()
        blocks = F.avg_pool2d(gradient, _BLOCK // scale).flatten(1).sort(1).values
        quarter = max(1, blocks.shape[1] // 4)
        found += [blocks[:, :quarter].mean(1), blocks[:, -quarter:].mean(1)]
    return torch.stack(found, 1).log()
