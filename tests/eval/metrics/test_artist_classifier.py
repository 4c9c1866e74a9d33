import numpy as np
import torch
import torch.nn.functional as F

from lsast_eval.metrics.artist_classifier import LinearProbe, assign_folds, held_out_predictions


def _clouds(counts: tuple[int, ...], dim: int = 12, apart: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(counts), dim)) * apart
    labels = np.repeat(np.arange(len(counts)), counts)
    return (centres[labels] + rng.normal(size=(len(labels), dim))).astype(np.float32), labels


def test_linear_probe_fit_is_a_stationary_point():
    vectors, labels = _clouds((40, 10), apart=0.5)
    probe = LinearProbe.fit(vectors, labels, 2, 0.05)
    weight, bias = (torch.tensor(array, requires_grad=True) for array in (probe.weight, probe.bias))
    logits = torch.from_numpy((vectors - probe.mean) * probe.scale) @ weight + bias
    y = torch.from_numpy(labels)
    entropy = sum(F.cross_entropy(logits[y == label], y[y == label]) for label in (0, 1)) / 2
    (entropy + 0.025 * weight.square().sum()).backward()
    assert float(weight.grad.abs().max()) < 1e-3
    assert float(bias.grad.abs().max()) < 1e-3


def test_assign_folds_is_even_and_depends_on_the_file():
    labels = np.repeat([0, 1], [23, 11])
    digests = [f"{index:x}" for index in range(34)]
    folds = assign_folds(digests, labels, 5)
    for label in (0, 1):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    order = np.random.default_rng(0).permutation(34)
    np.testing.assert_array_equal(assign_folds([digests[i] for i in order], labels[order], 5), folds[order])


def test_held_out_predictions_do_not_see_their_fold():
    """Every vector is its own direction: what training saw is remembered, what it did not see is a guess."""
    vectors, labels = np.eye(40, dtype=np.float32), np.tile([0, 1], 20)
    assert (LinearProbe.fit(vectors, labels, 2, 1e-4).predict(vectors) == labels).all()
    folds = assign_folds([str(index) for index in range(40)], labels, 5)
    assert (held_out_predictions(vectors, labels, 2, folds, 1e-4) == labels).mean() < 0.75
