import numpy as np
import pytest
from PIL import Image

from lsast_train.base.base import Base
from lsast_train.finetuning import style_loss
from lsast_train.paintings import PaintingDataset, latent_statistics
from lsast_train.prompts.prompt_file import Prompts
from lsast_train.prompts.prompt_space import PromptSpace


@pytest.fixture(autouse=True)
def _few_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight crops stand for all works of the artist instead of 160, which every run describes first."""
    monkeypatch.setattr(style_loss, "WORKS", 8)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> PaintingDataset:
    folder = tmp_path_factory.mktemp("contents")
    rng = np.random.default_rng(5)
    for index in range(6):
        blocks = np.repeat(np.repeat(rng.integers(0, 255, (10, 12, 3), np.uint8), 8, 0), 8, 1)
        Image.fromarray(blocks).save(folder / f"{index}.png")
    return PaintingDataset.load(folder, 64, progress=False)


@pytest.fixture
def prompts(base: Base, collection: PaintingDataset) -> Prompts:
    """Untrained ones, with the statistics of the paintings' latents."""
    meta = {"works": "10", **latent_statistics(base, collection.training).to_meta()}
    return Prompts.of(PromptSpace(base.null_context, variant="step"), "red", base.fingerprint, meta)
