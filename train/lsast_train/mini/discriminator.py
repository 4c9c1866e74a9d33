"""Discriminator of overlapping patches (Isola et al. 2017, section 3.2.2) at two scales (Wang et al. 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Scores of patches of 26 pixels. The features have spectral normalisation (Miyato et al. 2018); the last layer has
    not, so that scores can reach the margin of the hinge loss."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = widths
        self.layers = nn.ModuleList(
            [
                spectral_norm(nn.Conv2d(3, first, 4, stride=2, padding=1)),
                spectral_norm(nn.Conv2d(first, second, 4, stride=2, padding=1)),
                spectral_norm(nn.Conv2d(second, third, 3, padding=1)),
                nn.Conv2d(third, 1, 3, padding=1),
            ]
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Image [B, 3, H, W] → features of each layer; the last are the scores [B, 1, H/4, W/4]."""
        features = [self.layers[0](image)]
        for layer in list(self.layers)[1:]:
            features.append(layer(F.leaky_relu(features[-1], 0.2)))
        return features


class MultiscaleDiscriminator(nn.Module):
    """One `PatchDiscriminator` sees the image, a second one its half: patches of 26 and of 52 pixels."""

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 192)) -> None:
        super().__init__()
        self.scales = nn.ModuleList(PatchDiscriminator(widths) for _ in range(2))

    def forward(self, image: torch.Tensor) -> list[list[torch.Tensor]]:
        """Image [B, 3, H, W] → the features of each scale, full size first."""
        full, half = self.scales
        return [full(image), half(F.avg_pool2d(image, 2))]


def d_loss(real: list[list[torch.Tensor]], fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017): max(0, 1 - D(real)) + max(0, 1 + D(fake)), mean over scales."""
    losses = [F.relu(1 - a[-1]).mean() + F.relu(1 + b[-1]).mean() for a, b in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


def g_loss(fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge loss of the generator: mean over scales of -D(fake)."""
    return torch.stack([-features[-1].mean() for features in fake]).mean()


def feature_matching(real: list[list[torch.Tensor]], fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Distance of the discriminator's features (Larsen et al. 2016): relative absolute error, summed over layers, mean
    over scales. The real features get no gradient."""
    distances = [
        (b - a.detach()).abs().mean() / a.detach().abs().mean()
        for real_scale, fake_scale in zip(real, fake, strict=True)
        for a, b in zip(real_scale[:-1], fake_scale[:-1], strict=True)
    ]
    return torch.stack(distances).sum() / len(real)
