import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lsast_train.checkpoints.source import BaseSource


def _tensors(network: Any) -> dict[str, torch.Tensor]:
    return {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}


def _same(found: Any, expected: Any) -> bool:
    ours, theirs = _tensors(found), _tensors(expected)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture
def published(compvis_base: Any) -> SimpleNamespace:
    """The files of `compvis_base`, and what tests ask about them.

    ``source(**changes)``: the `BaseSource` of both files. ``same(found, expected)``: whether two networks have equal
    tensors. ``tensors(network)``: by names without ``text_model.``. ``one_set``: the base without averaged weights.
    """
    return SimpleNamespace(
        file=compvis_base.file,
        controlnet_file=compvis_base.controlnet_file,
        networks=compvis_base.networks,
        all_tensors=compvis_base.tensors,
        one_set={key: value for key, value in compvis_base.tensors.items() if not key.startswith("model_ema.")},
        source=lambda **changes: BaseSource(
            **{"base": compvis_base.file, "controlnet": compvis_base.controlnet_file, **changes}
        ),
        same=_same,
        tensors=_tensors,
    )


@pytest.fixture(scope="session")
def saved(compvis_base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base ``tiny-v1-5`` as diffusers and transformers write it; its ControlNet is ``canny`` beside it."""
    root = tmp_path_factory.mktemp("saved")
    for name, part in (("unet", "ema"), ("vae", "autoencoder"), ("text_encoder", "text_encoder")):
        compvis_base.networks[part].save_pretrained(root / "tiny-v1-5" / name)
    compvis_base.networks["controlnet"].save_pretrained(root / "canny")
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """The base of `saved`, to be changed."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path / "tiny-v1-5"
