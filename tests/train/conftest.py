from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lsast_train.base import Base
from lsast_train.mini.architecture import MiniConfig, build_mini
from lsast_train.options import TrainOptions
from lsast_train.paintings import Collection

SIZE = 64


@pytest.fixture(autouse=True)
def _one_quiet_cpu_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Tiny networks are slower on many threads; results must not depend on a GPU that happens to be there."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def base() -> Base:
    """A base of a few ten thousand random weights: 4 tokens of 24 channels, v-prediction."""
    return build_mini(MiniConfig.tiny())


@pytest.fixture(scope="session")
def paintings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of one palette: the mean of their latents is something that prompts can learn."""
    folder = tmp_path_factory.mktemp("paintings")
    rng = np.random.default_rng(0)
    for index in range(10):
        colour = np.array([200, 60, 30]) + rng.integers(-10, 10, 3)
        pixels = np.clip(colour + rng.normal(0, 6, (80, 96, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def collection(paintings: Path) -> Collection:
    return Collection.load(paintings, SIZE, progress=False)


@pytest.fixture
def brief() -> TrainOptions:
    """A run of a second: 64 pixels, few and large steps."""
    return TrainOptions(
        steps=10,
        batch=4,
        lr=0.1,
        map_lr=0.04,
        schedule="constant",
        weight_decay=0.0,
        size=SIZE,
        views=1,
        evaluate_every=10,
        evaluate_latents=4,
    )
