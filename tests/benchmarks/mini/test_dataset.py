"""The latent cache against an encoder whose output can be computed from the picture by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.mini.training.dataset import LatentDataset, build_cache, fit_picture, is_held_out
from lsast_engines.errors import TrainingError
from lsast_engines.images import canny_edges, read_picture


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


def test_cache_has_folders_as_labels_and_splits_by_name(cache, picture_folders):
    data = LatentDataset(cache)
    names = [f"{folder.name}/{path.name}" for folder in picture_folders for path in sorted(folder.iterdir())]
    assert data.label_names == ["blue", "red"]
    assert len(data.held_out) > 0
    assert data.held_out.tolist() == [i for i, name in enumerate(names) if is_held_out(name)]
    assert sorted([*data.train, *data.held_out]) == list(range(len(names)))


def test_window_is_a_crop_of_latents_with_its_edges(cache, picture_folders):
    data = LatentDataset(cache)
    rgb = fit_picture(read_picture(sorted(picture_folders[0].iterdir())[3]).rgb)
    image = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1
    whole = BlockMean()(image)[0].numpy()
    edges = canny_edges(rgb)
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


def test_sampling_weights_follow_shares_and_small_pictures_are_left_out(cache):
    data = LatentDataset(cache)
    weights = data.sampling_weights({"blue": 0.0})
    assert set(data.labels[data.train[weights > 0]].tolist()) == {1}
    assert weights.sum() == pytest.approx(1)
    window = data.window(data.train[:3], 16, np.random.default_rng(0))
    assert window.latents.shape == (3, 4, 16, 16)
    assert window.labels.tolist() == data.labels[data.train[:3]].tolist()
    side = int(data.sizes[data.held_out].min(axis=1).max())
    large = [i for i in data.train if min(data.sizes[i]) >= side]
    assert 0 < len(large) < len(data.train)
    assert LatentDataset(cache, side=side).train.tolist() == large
    with pytest.raises(TrainingError, match=r"found 0 pictures in .* that hold a window of 150 latents"):
        LatentDataset(cache, side=150)


@pytest.mark.parametrize(("shape", "fitted"), [
    ((100, 100), (512, 512)),
    ((300, 420), (432, 608)),  # 512² pixels at 1.4:1 are 432.7 by 605.8
    ((1000, 900), (536, 488)),
    ((256, 2000), (360, 728)),  # 2:1 at most: 362 by 724
])  # fmt: skip
def test_fit_picture_gives_512_squared_pixels(shape, fitted):
    assert fit_picture(np.zeros((*shape, 3), np.uint8)).shape == (*fitted, 3)


def test_fit_picture_of_a_long_picture_keeps_the_middle():
    rgb = np.zeros((100, 400, 3), np.uint8)
    rgb[:, 100:300] = 200
    assert fit_picture(rgb).min() == 200


def test_missing_cache_raises(tmp_path):
    with pytest.raises(TrainingError, match=r"python -m benchmarks\.mini\.training base"):
        LatentDataset(tmp_path / "none.safetensors")
