"""The latent cache against an encoder whose output can be computed from the picture by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lsast_engines.errors import TrainingError
from lsast_engines.pictures import edge_map, read_picture
from lsast_train.mini.dataset import LatentDataset, build_cache, fit_picture, is_held_out


class BlockMean(torch.nn.Module):
    """Mean of every 8×8 block, with the luminance as a fourth channel."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = image.float()
        return torch.nn.functional.avg_pool2d(torch.cat([image, image.mean(1, keepdim=True)], 1), 8)


@pytest.fixture(scope="module")
def cache(picture_folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "latents.safetensors"
    build_cache(picture_folders, BlockMean(), path)
    return path


def test_labels_are_the_folders_and_the_split_is_the_hash_of_the_name(cache: Path, picture_folders: list[Path]) -> None:
    data = LatentDataset(cache)
    names = [f"{folder.name}/{path.name}" for folder in picture_folders for path in sorted(folder.iterdir())]
    assert data.label_names == ["blue", "red"]
    assert len(data.held_out) > 0
    assert data.held_out.tolist() == [i for i, name in enumerate(names) if is_held_out(name)]
    assert sorted([*data.train, *data.held_out]) == list(range(len(names)))


def test_a_window_is_a_crop_of_the_encoded_picture_with_its_own_edges(cache: Path, picture_folders: list[Path]) -> None:
    data = LatentDataset(cache)
    rgb = fit_picture(read_picture(sorted(picture_folders[0].iterdir())[3]).rgb)
    image = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1
    whole = BlockMean()(image)[0].numpy()
    edges = edge_map(rgb)
    n = 16
    places = {
        whole[:, y : y + n, x : x + n].astype(np.float16).tobytes(): (y, x)
        for y in range(whole.shape[1] - n + 1)
        for x in range(whole.shape[2] - n + 1)
    }
    found = set()
    for seed in range(12):
        window = data.window(np.array([3]), n, np.random.default_rng(seed))
        crop, edge = window.latents[0].numpy().astype(np.float16), window.edges[0, 0].numpy()
        mirrored = crop.tobytes() not in places
        if mirrored:
            crop, edge = crop[..., ::-1], edge[:, ::-1]
        y, x = places[crop.tobytes()]
        np.testing.assert_array_equal(edge, edges[8 * y : 8 * (y + n), 8 * x : 8 * (x + n)])
        found.add(mirrored)
    assert found == {True, False}


def test_shares_weigh_labels_and_small_pictures_are_left_out_of_large_windows(cache: Path) -> None:
    data = LatentDataset(cache)
    only_red = next(data.batches(64, 16, np.random.default_rng(0), {"blue": 0.0}))
    assert set(only_red.labels.tolist()) == {1}
    large = [i for i in data.train if min(data._latents[i].shape[1:]) >= 34]
    assert 0 < len(large) < len(data.train)
    windows = data.batches(32, 34, np.random.default_rng(0), {})
    assert next(windows).latents.shape == (32, 4, 34, 34)


def test_fitting_bounds_both_sides() -> None:
    for shape in [(100, 100), (300, 420), (1000, 900), (256, 2000)]:
        fitted = fit_picture(np.zeros((*shape, 3), np.uint8)).shape
        assert all(n % 8 == 0 for n in fitted[:2])
        assert 256 <= min(fitted[:2]) <= 384
        assert max(fitted[:2]) <= 2 * min(fitted[:2])


def test_a_missing_cache_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lsast-train mini"):
        LatentDataset(tmp_path / "none.safetensors")
