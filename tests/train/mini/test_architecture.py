from __future__ import annotations

import pytest
import torch

from lsast_train.base.attention import cross_attention_layers
from lsast_train.base.mini_autoencoder import MiniAutoencoder
from lsast_train.base.style_encoder import PATCH, StyleEncoder
from lsast_train.mini.architecture import MiniConfig, build_mini


def test_style_tokens_do_not_depend_on_the_order_of_patches() -> None:
    torch.manual_seed(0)
    encoder = StyleEncoder(4, 24).eval()
    latents = torch.randn(2, 4, 16, 16)
    patches = latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).reshape(2, 4, 16, PATCH, PATCH)
    shuffled = patches[:, :, torch.randperm(16)].view(2, 4, 4, 4, PATCH, PATCH)
    shuffled = shuffled.permute(0, 1, 2, 4, 3, 5).reshape(2, 4, 16, 16)
    assert not torch.equal(latents, shuffled)
    torch.testing.assert_close(encoder(shuffled), encoder(latents), atol=1e-5, rtol=1e-5)
    assert (encoder(latents)[0] - encoder(latents)[1]).abs().mean() > 1e-3


def test_mini_decoder_is_local() -> None:
    torch.manual_seed(0)
    autoencoder = MiniAutoencoder((8, 8, 12), (16, 8, 8)).eval()
    latents = torch.randn(1, 4, 40, 8)
    changed = latents.clone()
    changed[:, :, 36:] += 1
    difference = (autoencoder.decode(latents) - autoencoder.decode(changed)).abs().amax((0, 1, 3))
    # Receptive field at 1/8, 1/4 and 1/2: 7, 7 and 6 convolutions of radius 1, so under 14 latents on one side.
    assert difference[: (36 - 14) * 8].max() == 0
    assert difference[36 * 8 :].min() > 0


@pytest.mark.parametrize("config", [MiniConfig(), MiniConfig.tiny()], ids=["embedded", "tiny"])
def test_mini_has_wide_heads_and_cross_attention_in_every_group(config: MiniConfig) -> None:
    with torch.device("meta"):
        base = build_mini(config)
    layers = cross_attention_layers(base.unet)
    assert {layer.group for layer in layers} == {"down", "mid", "up"}
    assert {layer.group for layer in cross_attention_layers(base.controlnet)} == {"down", "mid"}
    # TensorRT refuses native attention with heads narrower than 16 channels (docs/mini.md).
    assert min(layer.width // layer.module.heads for layer in layers) >= 16
