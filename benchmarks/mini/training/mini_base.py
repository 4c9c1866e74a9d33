"""The shape of mini: Stable Diffusion 1.5's plan at a fifth of its width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from lsast_train.base.base import Base, BaseConfig
from lsast_train.base.mini_networks import MiniAutoencoder, StyleEncoder


@dataclass(frozen=True)
class MiniConfig:
    """Widths of a mini base. The default is the embedded one: 14 M + 6 M parameters."""

    widths: tuple[int, ...] = (64, 96, 160, 224)
    """U-Net channels at 1/8, 1/16, … of the picture; the last level has no attention, as in SD 1.5."""
    heads: int = 4
    """Attention heads (diffusers calls this number ``attention_head_dim``)."""
    norm_groups: int = 16
    """Groups of the U-Net's normalisation."""
    tokens: int = 8
    """Tokens of a context."""
    dim: int = 256
    """Channels of a token."""
    hint_widths: tuple[int, ...] = (8, 16, 32, 64)
    """Channels of ControlNet's hint encoder at 1, 1/2, 1/4 and 1/8 of the picture."""
    encoder_widths: tuple[int, int, int] = (64, 96, 128)
    """Channels of the autoencoder's encoder at 1/2, 1/4 and 1/8: narrower ones lose the texture."""
    decoder_widths: tuple[int, int, int] = (128, 96, 64)
    """Channels of its decoder at 1/8, 1/4 and 1/2: brush strokes are made here, once a picture."""

    @staticmethod
    def tiny() -> MiniConfig:
        """A tiny base, for tests."""
        return MiniConfig((16, 32), 1, 8, 4, 24, (4, 8, 8, 16), (8, 8, 12), (16, 8, 8))

    @property
    def only_cross_attention(self) -> tuple[bool, ...]:
        """Which levels attend to the context only: the two finest. Self-attention there is quadratic in the picture's
        area; a second cross-attention in its place is quicker and gives style two ways in.
        """
        return tuple(level < 2 and level < len(self.widths) - 1 for level in range(len(self.widths)))


def build_mini(config: MiniConfig, seed: int = 0) -> Base:
    """A mini base with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        levels = len(config.widths)
        shared = {
            "block_out_channels": config.widths,
            "layers_per_block": 1,
            "cross_attention_dim": config.dim,
            "attention_head_dim": config.heads,
            "norm_num_groups": config.norm_groups,
            "only_cross_attention": config.only_cross_attention,
            "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        }
        # A list of booleans does not reach the middle block; it keeps self- and cross-attention.
        unet = UNet2DConditionModel(
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            mid_block_only_cross_attention=False,
            **shared,
        )
        controlnet = ControlNetModel(conditioning_embedding_out_channels=config.hint_widths, **shared)
        init_zero_convs(controlnet)
        return Base(
            BaseConfig("mini", "mini", "v_prediction", config.tokens, 512, 1.0),
            fingerprint="0" * 64,
            unet=unet,
            controlnet=controlnet,
            autoencoder=MiniAutoencoder(config.encoder_widths, config.decoder_widths),
            style_encoder=StyleEncoder(config.tokens, config.dim),
            null_context=torch.randn(config.tokens, config.dim),
        )


def init_zero_convs(controlnet: ControlNetModel) -> None:
    """Small random weights in ControlNet's zero convolutions.

    Zeros protect a *frozen* U-Net; trained jointly from nothing they keep the edges out for long (docs/mini.md).
    """
    zero = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
    for convolution in [*zero, controlnet.controlnet_cond_embedding.conv_out]:
        nn.init.kaiming_uniform_(convolution.weight, a=5**0.5)
        with torch.no_grad():
            convolution.weight.mul_(0.3)
