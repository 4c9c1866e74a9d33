import itertools
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lsast_engines.errors import PictureError, TrainingError
from lsast_train.paintings import (
    CachedLatents,
    Painting,
    PaintingDataset,
    encode_pictures,
    held_out_names,
    latent_statistics,
    random_crop,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _by_name(collection: PaintingDataset) -> dict[str, Painting]:
    return {painting.name: painting for painting in collection.training + collection.held_out}


def _gradient(height: int, width: int) -> np.ndarray[Any, Any]:
    """Every pixel another one."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=2).astype(np.uint8)


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """Every kind of file that a collection scraped together may hold."""
    folder = tmp_path / "odd"
    (folder / "deep" / "er").mkdir(parents=True)
    plain = Image.fromarray(_gradient(80, 96))
    plain.save(folder / "plain.png")
    plain.save(folder / "deep" / "twin.png")
    Image.new("CMYK", (80, 80), (0, 255, 255, 0)).save(folder / "deep" / "er" / "cmyk.jpg", quality=100)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(_gradient(70, 100)).save(folder / "turned.png", exif=turned)
    glass = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    glass.save(folder / "glass.png")
    Image.new("RGB", (63, 500)).save(folder / "thin.png")
    (folder / "broken.jpg").write_bytes((folder / "deep" / "er" / "cmyk.jpg").read_bytes()[:400])
    (folder / "text.png").write_text("not a picture")
    (folder / "notes.txt").write_text("no picture at all")
    return folder


def test_dataset_of_odd_pictures_uses_them_or_lists_them_in_one_line(odd_folder, caplog):
    with caplog.at_level(logging.WARNING, "lsast"):
        found = _by_name(PaintingDataset.load(odd_folder, 64, progress=False))
    assert set(found) == {"deep/er/cmyk.jpg", "deep/twin.png", "glass.png", "turned.png"}
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("left out 4 of 8 pictures: ")
    for part in (
        "broken.jpg (unreadable)",
        "text.png (unreadable)",
        "thin.png (63 by 500 pixels, shorter side below 64)",
        "plain.png (same as deep/twin.png)",
    ):
        assert part in message
    assert "notes.txt" not in message
    np.testing.assert_array_equal(found["deep/twin.png"].pixels, _gradient(80, 96))
    np.testing.assert_array_equal(found["turned.png"].pixels, np.rot90(_gradient(70, 100), -1))
    assert np.abs(found["deep/er/cmyk.jpg"].pixels.astype(float) - (255, 0, 0)).max() <= 8
    assert found["glass.png"].pixels.min() == 255


@pytest.mark.parametrize(
    ("side", "how", "held"),
    [
        ((80, 90), {"size": 64}, (80, 90)),  # between size and 1.5 sizes: as it is
        ((64, 128), {"size": 64}, (64, 128)),
        ((192, 480), {"size": 64}, (96, 240)),  # shorter side down to 1.5 sizes
        ((64, 70), {"size": 128}, (128, 140)),  # enlarged
        ((300, 97), {"size": 64, "crop": "squash"}, (64, 64)),
        ((96, 120), {"size": 64, "painted": 128}, (128, 160)),  # at the scale of the base
        ((96, 120), {"size": 64, "painted": 128, "crop": "squash"}, (64, 64)),
    ],
)
def test_dataset_holds_paintings_at_the_size_of_training(tmp_path, side, how, held):
    for index in range(2):
        Image.fromarray(_gradient(*side) + np.uint8(index)).save(tmp_path / f"{index}.png")
    for painting in _by_name(PaintingDataset.load(tmp_path, **how, progress=False)).values():
        assert painting.pixels.shape == (*held, 3)
        assert painting.pixels.dtype == np.uint8
        assert random_crop(painting, how["size"], _generator()).shape == (how["size"], how["size"], 3)


def test_dataset_of_too_few_pictures_raises(tmp_path):
    with pytest.raises(PictureError, match="found no folder"):
        PaintingDataset.load(tmp_path / "nowhere", 64, progress=False)
    with pytest.raises(PictureError, match="found no picture"):
        PaintingDataset.load(tmp_path, 64, progress=False)
    Image.new("RGB", (80, 80)).save(tmp_path / "one.png")
    with pytest.raises(TrainingError, match=r"found 1 usable pictures .* expected at least 2"):
        PaintingDataset.load(tmp_path, 64, progress=False)


def test_held_out_names_are_an_eighth_and_never_move():
    names = [f"{index}.jpg" for index in range(1000)]
    held = held_out_names(names)
    assert 90 < len(held) < 160
    assert held_out_names(names[::-1]) == held
    assert held & set(names[:400]) == held_out_names(names[:400])
    for start, count in itertools.product(range(60), (2, 3, 7)):  # of few, some but not all
        assert 1 <= len(held_out_names(names[start : start + count])) < count


def test_dataset_digest_changes_with_pixels_and_names(paintings, tmp_path):
    def digest(folder: Path) -> str:
        return PaintingDataset.load(folder, 64, progress=False).digest

    copy = tmp_path / "copy"
    shutil.copytree(paintings, copy)
    original = digest(paintings)
    assert digest(copy) == original
    (copy / "0.png").rename(copy / "zero.png")
    renamed = digest(copy)
    Image.new("RGB", (80, 80)).save(copy / "zero.png")
    assert len({original, renamed, digest(copy)}) == 3


def test_random_crop_is_a_part_of_the_painting_anywhere():
    pixels = _gradient(70, 66)
    corners = set()
    for seed in range(200):
        window = random_crop(Painting("x", pixels), 64, _generator(seed))
        top, left = int(window[0, 0, 0]), int(window[0, 0, 1])
        np.testing.assert_array_equal(window, pixels[top : top + 64, left : left + 64])
        corners.add((top, left))
    assert {top for top, _ in corners} == set(range(7))
    assert {left for _, left in corners} == set(range(3))


def test_cached_latents_are_those_of_the_crops_and_their_mirror_images(base):
    squares = [Painting(str(index), np.roll(_gradient(64, 64), 20 * index, axis=0)) for index in range(2)]
    views = CachedLatents.encode(base, squares, 64, 2, _generator())
    expected = []
    for square in squares:
        for pixels in (square.pixels, square.pixels[:, ::-1]):
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            expected.append(base.encode(image)[0])
    torch.testing.assert_close(views.take(torch.arange(4), _generator()), torch.cat(expected))
    assert len(CachedLatents.encode(base, squares, 64, 2, _generator(), mirrored=False)) == 2


def test_latents_are_scaled_samples_of_the_posterior():
    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(image), 4, 8, 8)
        return torch.full(shape, 2.0), torch.full(shape, 3.0)

    stub: Any = SimpleNamespace(encode=encode, device=torch.device("cpu"), config=SimpleNamespace(latent_scale=0.5))
    cached = CachedLatents.encode(stub, [Painting("x", _gradient(64, 64))], 64, 1, _generator())
    drawn = cached.sample(200, _generator())
    assert drawn.mean().item() == pytest.approx(1.0, abs=0.03)
    assert drawn.std().item() == pytest.approx(1.5, abs=0.03)
    assert not torch.equal(drawn[0], drawn[1])


def test_latent_statistics_are_means_over_paintings_of_the_middle(base):
    tall = [Painting(str(index), np.roll(_gradient(80, 64), 20 * index, axis=0)) for index in range(3)]
    latents = encode_pictures(base, [painting.pixels[8:72] for painting in tall])[0].numpy() * base.config.latent_scale
    found = latent_statistics(base, tall)
    np.testing.assert_allclose(found.mean, latents.mean((2, 3)).mean(0), atol=1e-5)
    np.testing.assert_allclose(found.std, latents.std((2, 3), ddof=1).mean(0), rtol=1e-4)
    assert latent_statistics(base, tall, most=1) == latent_statistics(base, tall[:1])
