"""mini's own networks: its autoencoder, and the encoder of style that stands in for a text encoder.

The autoencoder has factor 8 and 4 channels, near the latents of Stable Diffusion 1.x, and most work at 1/8 and 1/4
size. Residual blocks without normalisation, as in TAESD (github.com/madebyollin/taesd), so the result at a pixel
depends on its neighbourhood only and pictures can be of any size. TAESD keeps 64 channels up to full resolution; here
the widths shrink as the resolution grows, and the last doubling is a pixel shuffle.

While the base is trained its cross-attention reads style tokens computed from another crop of the picture, so not even
their content is that of the target; the prompt space later takes their place. The tokens must tell brush strokes and
palette, not content: patches of 4×4 latents (32×32 pixels) are read one by one and pooled without order, so shuffling
the patches changes nothing.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

LATENT_BOUND = 3.0
"""Latents are softly bounded to this magnitude before decoding, as TAESD does: outliers of sampling stay harmless."""

PATCH = 4
"""Side of a patch in latents."""

_STATISTICS = 20
"""Mean (4) and spread (4) of the channels, their spread within patches (4) and mean absolute steps along x, y (8)."""


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

    Widths are channels, blocks are residual blocks at 1/2, 1/4 and 1/8 of the size; in the decoder the other way round.
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
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        channels = 12
        for stride, width, blocks in zip((1, 2, 2), encoder_widths, encoder_blocks, strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), *(ResidualBlock(width) for _ in range(blocks))]
            channels = width
        self.encoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(channels, 4, 3, padding=1))
        layers, channels = [], 4
        for width, blocks in zip(decoder_widths, decoder_blocks, strict=True):
            if layers:
                layers.append(nn.Upsample(scale_factor=2))
            layers += [nn.Conv2d(channels, width, 3, padding=1), *(ResidualBlock(width) for _ in range(blocks))]
            channels = width
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(channels, 12, 3, padding=1), nn.PixelShuffle(2))

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Image [B, 3, H, W] in [-1, 1] → latent [B, 4, H/8, W/8]."""
        out: torch.Tensor = self.encoder(image)
        return out

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Latent [B, 4, h, w] → image [B, 3, 8h, 8w], about [-1, 1]."""
        out: torch.Tensor = self.decoder(torch.tanh(latent / LATENT_BOUND) * LATENT_BOUND)
        return out


class StyleEncoder(ModelMixin, ConfigMixin):
    """Latents [B, 4, h, w] → style tokens [B, tokens, dim], each token layer-normalised.

    Normalised, because un-normalised tokens of a trial run stayed a constant that the U-Net learned to ignore
    (docs/mini.md); with the statistics beside the learned features, because those are informative from step one.
    """

    @register_to_config
    def __init__(self, tokens: int = 8, dim: int = 256, width: int = 256) -> None:
        super().__init__()
        self.tokens = tokens
        self.patch = nn.Sequential(nn.Linear(4 * PATCH * PATCH, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.head = nn.Sequential(
            nn.Linear(2 * width + _STATISTICS, 2 * width), nn.SiLU(), nn.Linear(2 * width, tokens * dim)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Tokens of `latents`, each [4, h, w] with h, w at least 4; rows and columns past a multiple of 4 are cut."""
        batch, channels, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        cut = latents[:, :, : rows * PATCH, : columns * PATCH]
        # [B, C, rows, 4, columns, 4] → [B, patches, C, 4, 4]
        bag = cut.view(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        features = self.patch(bag.flatten(2))  # [B, patches, width]
        pooled = torch.cat([features.mean(1), features.std(1, correction=0)], dim=1)
        statistics = torch.cat(
            [
                bag.mean((1, 3, 4)),
                bag.permute(0, 2, 1, 3, 4).flatten(2).std(2, correction=0),
                bag.flatten(3).std(3, correction=0).mean(1),
                bag.diff(dim=3).abs().mean((1, 3, 4)),
                bag.diff(dim=4).abs().mean((1, 3, 4)),
            ],
            dim=1,
        )
        tokens = self.head(torch.cat([pooled, statistics], dim=1)).view(batch, self.tokens, -1)
        out: torch.Tensor = self.norm(tokens)
        return out
