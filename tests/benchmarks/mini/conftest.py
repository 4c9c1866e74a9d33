from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image


@pytest.fixture(autouse=True)
def _quiet_cpu(monkeypatch, tmp_path):
    """Results must not depend on a GPU that happens to be there."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder of TAESD's class with random weights."""
    torch.manual_seed(0)
    width = (8, 8, 8, 8)
    folder = tmp_path_factory.mktemp("teacher")
    AutoencoderTiny(
        encoder_block_out_channels=width,
        decoder_block_out_channels=width,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two labels, told apart by their colour; pictures of several sizes, every one with a sharp disc."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, colour in {"red": (200, 40, 30), "blue": (30, 60, 210)}.items():
        (root / label).mkdir()
        for index in range(45):
            height, width = rng.integers(256, 300, 2)
            yy, xx = np.mgrid[:height, :width]
            cy, cx, radius = rng.integers(80, 170, 3)
            disc = ((yy - cy) ** 2 + (xx - cx) ** 2 < (radius / 2) ** 2)[..., None]
            rgb = np.where(disc, 255 - np.array(colour), np.array(colour)) + rng.normal(0, 4, (height, width, 3))
            Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(root / label / f"{index:03}.png")
    return [root / "blue", root / "red"]
