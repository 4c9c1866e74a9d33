"""The networks that the metrics' papers used, where package and weights are already on this machine.

Each opener returns the network or, in one line, what is missing. Nothing is downloaded: the weights are looked for
where torch.hub keeps them (``$TORCH_HOME/hub/checkpoints``), under the names that torch-fidelity and torchvision give
them. All files are read by torch's restricted loader.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsast_engines.files import file_sha256

from .content import Pixels, resized
from .effnet import self_similarity_divergence
from .networks import PairDistance, SetNetwork

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
"""TensorFlow's Inception of the FID paper, as converted by torch-fidelity."""
ALEXNET = "alexnet-owt-7be5be79.pth"
"""Trunk of LPIPS; its learned weights are in the package lpips."""
VGG19 = "vgg19-dcbb9e9d.pth"
"""Trunk of CFSD."""

_IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


def inception() -> SetNetwork | str:
    """Inception v3 for FID and KID, through torch-fidelity."""
    module = _module("torch_fidelity")
    weights = _weights(INCEPTION)
    if isinstance(module, str) or isinstance(weights, str):
        return _and(module, weights)
    # torch-fidelity unpickles this file; what the restricted loader refuses must not get that far.
    torch.load(weights, map_location="cpu", weights_only=True)
    return _Inception(
        module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    )


def lpips() -> PairDistance | str:
    """LPIPS v0.1 on AlexNet (Zhang et al. 2018), through the package lpips."""
    module, weights = _module("lpips"), _weights(ALEXNET)
    if isinstance(module, str) or isinstance(weights, str):
        return _and(module, weights)
    metric = module.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trained = torch.load(weights, map_location="cpu", weights_only=True)
    # slice2.3.weight there is features.3.weight in torchvision's file.
    names = {name: f"features.{name.partition('.')[2]}" for name in metric.net.state_dict()}
    metric.net.load_state_dict({name: trained[source] for name, source in names.items()})
    metric.eval().requires_grad_(False)
    return PairDistance("lpips", _Scaled(), lambda content, result: float(metric(content[0][None], result[0][None])))


def cfsd() -> PairDistance | str:
    """CFSD as in StyleID's evaluation/image_metrics.py (`PatchSimi`): VGG-19 behind the ReLU of conv3_1."""
    module, weights = _module("torchvision"), _weights(VGG19)
    if isinstance(module, str) or isinstance(weights, str):
        return _and(module, weights)
    layers = module.models.vgg19(weights=None).features[:12]
    trained: Mapping[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    layers.load_state_dict({name: trained[f"features.{name}"] for name in layers.state_dict()})
    layers.eval().requires_grad_(False)
    return PairDistance("cfsd", _Vgg(layers), lambda content, result: self_similarity_divergence(content[0], result[0]))


class _Inception:
    """Torch-fidelity's extractor as a `SetNetwork`; pictures are squashed to its 299 pixels with antialiasing."""

    suffix = ""
    key = "inception-6726825d-1"
    pooled = slice(None)

    def __init__(self, network: Any) -> None:
        self._network = network

    def prepare(self, rgb: Pixels) -> Pixels:
        return resized(rgb, 299, 299)

    @torch.inference_mode()
    def features(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        (vectors,) = self._network(torch.from_numpy(batch).permute(0, 3, 1, 2))
        return np.asarray(vectors.numpy(), dtype=np.float32)


class _Scaled:
    """A picture in [-1, 1]: LPIPS runs its trunk itself."""

    def look(self, rgb: Pixels) -> Sequence[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1).float() / 127.5 - 1]


class _Vgg:
    """Vectors of every position over the number of channels, [P, 256]."""

    def __init__(self, layers: Any) -> None:
        self._layers = layers

    @torch.inference_mode()
    def look(self, rgb: Pixels) -> Sequence[torch.Tensor]:
        mean, std = _IMAGENET
        pixels = (torch.from_numpy(np.ascontiguousarray(rgb)).float() / 255 - mean) / std
        maps = self._layers(pixels.permute(2, 0, 1)[None])[0]
        return [maps.flatten(1).T / len(maps)]


def _module(name: str) -> Any:
    """The module, or why there is none."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error})"


def _weights(name: str) -> Path | str:
    """The weights file, or why there is none; torch.hub's names end in the beginning of the file's SHA-256."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        return f"found no weights {path}"
    wanted = name.removesuffix(".pth").rpartition("-")[2]
    found = file_sha256(path)[: len(wanted)]
    return path if found == wanted else f"{path} is damaged: its SHA-256 begins with {found}, expected {wanted}"


def _and(*found: object) -> str:
    return "; ".join(part for part in found if isinstance(part, str))
