from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsast_train.base.base import Base
from lsast_train.inversion import Inversion
from lsast_train.options import TrainOptions
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_file import Prompts, load_prompts


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> PaintingDataset:
    folder = tmp_path_factory.mktemp("contents")
    rng = np.random.default_rng(5)
    for index in range(6):
        blocks = np.repeat(np.repeat(rng.integers(0, 255, (10, 12, 3), np.uint8), 8, 0), 8, 1)
        Image.fromarray(blocks).save(folder / f"{index}.png")
    return PaintingDataset.load(folder, 64, progress=False)


@pytest.fixture
def prompts(base: Base, collection: PaintingDataset, brief: TrainOptions, tmp_path: Path) -> Prompts:
    result = Inversion(base, collection, replace(brief, steps=1, variant="step"), "red", tmp_path / "inversion").run()
    return load_prompts(result.file, base)
