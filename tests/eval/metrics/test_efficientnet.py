import numpy as np
import pytest
import torch

from lsast_eval.metrics.efficientnet import (
    EffNetLite,
    perceptual_distance,
    self_similarity_divergence,
    structure_distance,
)

from ..conftest import scene


@pytest.fixture(scope="module")
def network() -> EffNetLite:
    return EffNetLite()


@pytest.mark.parametrize(("size", "width"), [(0, 1664), (2, 1696)])
def test_pooled_features_lead_to_the_packages_own_logits(size, width):
    network = EffNetLite(size)
    assert network.key != EffNetLite(2 - size).key
    prepared = np.stack([network.prepare(scene(seed, 300)) for seed in (1, 2)])
    vectors = network.features(prepared)
    assert vectors.shape == (2, width)
    with torch.no_grad():
        whole = network._network((torch.from_numpy(prepared).permute(0, 3, 1, 2).float() - 127) / 128)
        ours = network._network._fc(torch.from_numpy(vectors[:, network.pooled]))
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


def test_texture_features_are_moments_of_the_taps(network):
    prepared = network.prepare(scene(3, 224))
    taps = [tap.numpy() for tap in network.feature_maps(prepared)]
    assert [tap.shape for tap in taps] == [(16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)]
    moments = [part for tap in taps[:4] for part in (tap.mean((1, 2)), tap.std((1, 2), ddof=1))]
    np.testing.assert_allclose(
        network.features(prepared[None])[0, 1280:], np.concatenate(moments), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(("height", "width"), [(100, 400), (31, 31)])
def test_prepare_takes_the_middle_of_any_shape(network, height, width):
    assert network.prepare(np.zeros((height, width, 3), np.uint8)).shape == (224, 224, 3)


def test_perceptual_distance_is_one_minus_cosine():
    a, b = torch.randn(7, 4, 5), torch.randn(7, 4, 5)
    places = [1 - torch.cosine_similarity(a[:, i, j], b[:, i, j], dim=0) for i in range(4) for j in range(5)]
    assert perceptual_distance([a, a], [b, a]) == pytest.approx(float(torch.stack(places).mean()) / 2, abs=1e-6)


def test_self_similarity_divergence_is_a_kl_sum():
    c, r = torch.randn(9, 4), torch.randn(9, 4)
    p, q = (torch.softmax(v @ v.T, 1).double() for v in (c, r))
    expected = float((p * (p / q).log()).sum())
    assert self_similarity_divergence(c, r, rows=4) == pytest.approx(expected, rel=1e-5)
    assert self_similarity_divergence(c, r, rows=100) == pytest.approx(expected, rel=1e-5)


def test_structure_distance_ignores_an_offset():
    maps = [torch.randn(6, 8, 8) for _ in range(5)]
    shifted = [tap + torch.randn(6, 1, 1) for tap in maps]
    assert structure_distance(maps, shifted) == pytest.approx(0, abs=1e-5)
    assert structure_distance(maps, [tap.flip(2) for tap in maps]) > 0.1
