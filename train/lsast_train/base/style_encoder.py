"""Style tokens from a picture whose content is destroyed: a bag of latent patches.

mini has no text encoder. While the base is trained its cross-attention reads tokens computed from the picture
itself; the prompt space later takes their place. The tokens must tell brush strokes and palette, not content:
patches of 4×4 latents (32×32 pixels) are read one by one and pooled without order, so shuffling the patches changes
nothing.
The training run feeds another crop of the same picture, so not even the bag's content is that of the target.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

PATCH = 4
"""Side of a patch in latents."""

_STATISTICS = 20
"""Mean (4) and spread (4) of the channels, their spread within patches (4) and mean absolute steps along x, y (8)."""


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
