"""mini's autoencoder: factor 8, 4 channels, near the latents of Stable Diffusion 1.x, most work at 1/8 and 1/4 size.

Residual blocks without normalisation, as in TAESD (github.com/madebyollin/taesd), so the result at a pixel depends
on its neighbourhood only and pictures can be of any size. TAESD keeps 64 channels up to full resolution; here the
widths shrink as the resolution grows, and the last doubling is a pixel shuffle.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

LATENT_BOUND = 3.0
"""Latents are softly bounded to this magnitude before decoding, as TAESD does: outliers of sampling stay harmless."""


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), [B, C, h, w] → the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        out: torch.Tensor = x + self.second(torch.relu(self.first(torch.relu(x))))
        return out


class MiniAutoencoder(ModelMixin, ConfigMixin):
    """Deterministic autoencoder between images [B, 3, H, W] in [-1, 1] and latents [B, 4, H/8, W/8].

    Args:
        encoder_widths: channels at 1/2, 1/4 and 1/8 of the size.
        decoder_widths: channels at 1/8, 1/4 and 1/2 of the size.
        encoder_blocks: residual blocks at each of the encoder's sizes.
        decoder_blocks: residual blocks at each of the decoder's sizes.
    """

    @register_to_config
    def __init__(
        self,
        encoder_widths: tuple[int, int, int] = (64, 96, 128),
        decoder_widths: tuple[int, int, int] = (128, 96, 64),
        encoder_blocks: tuple[int, int, int] = (2, 2, 3),
        decoder_blocks: tuple[int, int, int] = (3, 3, 2),
    ) -> None:
        super().__init__()
        half, quarter, eighth = encoder_widths
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, half, 3, padding=1),
            *(ResidualBlock(half) for _ in range(encoder_blocks[0])),
            nn.Conv2d(half, quarter, 3, stride=2, padding=1),
            *(ResidualBlock(quarter) for _ in range(encoder_blocks[1])),
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            *(ResidualBlock(eighth) for _ in range(encoder_blocks[2])),
            nn.ReLU(),
            nn.Conv2d(eighth, 4, 3, padding=1),
        )
        eighth, quarter, half = decoder_widths
        self.decoder = nn.Sequential(
            nn.Conv2d(4, eighth, 3, padding=1),
            *(ResidualBlock(eighth) for _ in range(decoder_blocks[0])),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(eighth, quarter, 3, padding=1),
            *(ResidualBlock(quarter) for _ in range(decoder_blocks[1])),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(quarter, half, 3, padding=1),
            *(ResidualBlock(half) for _ in range(decoder_blocks[2])),
            nn.ReLU(),
            nn.Conv2d(half, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Image [B, 3, H, W] in [-1, 1] → latent [B, 4, H/8, W/8]."""
        out: torch.Tensor = self.encoder(image)
        return out

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Latent [B, 4, h, w] → image [B, 3, 8h, 8w], about [-1, 1]."""
        out: torch.Tensor = self.decoder(torch.tanh(latent / LATENT_BOUND) * LATENT_BOUND)
        return out
