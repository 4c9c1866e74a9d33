import math

import numpy as np
import pytest
import torch

from lsast_train.finetuning.style_loss import StyleLoss, energy_distance, roughness, self_similarities
from lsast_train.paintings import Painting

pytest.importorskip("efficientnet_lite_pytorch")


def test_energy_distance_equals_its_definition_over_pairs():
    rng = np.random.default_rng(0)
    rows, past, others = (torch.from_numpy(rng.normal(size=(count, 5))) for count in (4, 3, 6))
    same = [*rows, *past]
    across = np.mean([torch.dist(x, y).item() for x in rows for y in others])
    inside = np.mean([torch.dist(x, y).item() for i, x in enumerate(rows) for j, y in enumerate(same) if i != j])
    assert energy_distance(rows, past, others).item() == pytest.approx((2 * across - inside) / math.sqrt(5))


def test_self_similarities_ignore_colours_and_see_what_moves():
    generator = torch.Generator().manual_seed(0)
    taps = [torch.randn(1, 8, 6, 6, generator=generator) for _ in range(4)]
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    recoloured = [3 * torch.einsum("cd,bdhw->bchw", turn, tap) + 0.7 for tap in taps]
    moved = [tap.roll(1, 3) for tap in taps]
    expected = self_similarities(taps)
    assert len(expected) == 2
    for found, other, wanted in zip(self_similarities(recoloured), self_similarities(moved), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert (other - wanted).abs().mean() > 0.1


def test_roughness_measures_the_flattest_and_the_busiest_blocks():
    """Bands of 16 rows whose columns alternate by 0, 0.1 and 0.2; the last row of each meets the next band."""
    picture = torch.zeros(1, 3, 49, 49)
    for band, height in enumerate((0.0, 0.1, 0.2, 0.2)):
        picture[..., 16 * band : 16 * band + 16, ::2] = height
    flat, busy, *_ = roughness(picture)[0].exp()
    # The gradient of a flat pixel is 1e-4 instead of 0, for the sake of the derivative of the square root.
    assert flat.item() == pytest.approx((15 * 1e-4 + (0.1 + 1e-4) / 2) / 16, rel=1e-3)
    assert busy.item() == pytest.approx(0.2, rel=1e-3)


def test_roughness_tells_luminance_from_colour_and_fine_from_coarse():
    columns = torch.arange(65)
    fine, coarse = (columns % 2).float(), (columns // 4 % 2).float()
    grey, blue = torch.ones(3), torch.tensor([0.0, 0.0, 1.0]) - 0.114
    found = {
        name: roughness((0.5 * colour[:, None, None] * stripes).expand(3, 65, 65)[None])[0].exp()
        for name, colour, stripes in (("grey", grey, fine), ("blue", blue, fine), ("coarse grey", grey, coarse))
    }
    assert found["grey"][:2] == pytest.approx(0.5, rel=0.05)
    assert found["blue"][:2] == pytest.approx(1e-4, rel=0.5)
    assert found["blue"][4:6] == pytest.approx(0.5 * torch.linalg.vector_norm(blue).item(), rel=0.05)
    assert found["grey"][2:] == pytest.approx(1e-4, rel=0.5)
    assert found["coarse grey"][2:4] == pytest.approx(0.5, rel=0.05)


def test_style_loss_of_an_artists_own_works_is_less_than_of_other_pictures():
    rng = np.random.default_rng(0)

    def pictures(count: int, low: int, high: int) -> np.ndarray:
        return np.repeat(np.repeat(rng.integers(low, high, (count, 16, 16, 3), np.uint8), 4, 1), 4, 2)

    works = [Painting(str(index), pixels) for index, pixels in enumerate(pictures(24, 120, 200))]
    loss = StyleLoss(works, 64, 0, torch.device("cpu"))
    own, other = (
        torch.from_numpy(pictures(8, *values)).permute(0, 3, 1, 2).float() / 127.5 - 1
        for values in ((120, 200), (0, 255))
    )
    with torch.no_grad():
        found, wanted = (loss(images, own, remember=False) for images in (other, own))
    assert wanted.style < found.style - 0.2
    assert wanted.content.item() == pytest.approx(0, abs=1e-6)
    assert found.content > 0.05
    assert int(loss.filled) == 0
    loss(own, own)
    assert int(loss.filled) == 8
