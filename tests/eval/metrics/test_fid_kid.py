import numpy as np
import pytest

from lsast_eval.metrics.fid_kid import fid, kid
from lsast_eval.metrics.intervals import bootstrap_indices, score_of, wilson


def _sample(n: int, d: int, seed: int = 1, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ np.random.default_rng(9).normal(size=(d, d)) + shift


def _by_eigenvalues(x: np.ndarray, y: np.ndarray) -> float:
    """FID with the root of the product of covariances, as the paper writes it."""
    product = np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(product).astype(complex)).sum().real
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(np.cov(x, rowvar=False)) + np.trace(np.cov(y, rowvar=False)) - 2 * root)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 60, 5), (6, 9, 4), (7, 30, 12), (5, 4, 16)])
def test_fid_matches_the_papers_formula(n, m, d):
    x, y = _sample(n, d), 1.4 * _sample(m, d, seed=2, shift=0.3)
    assert fid(x, y)[0] == pytest.approx(_by_eigenvalues(x, y), rel=1e-5)


def test_kid_is_the_unbiased_discrepancy():
    x, y = _sample(9, 6), _sample(7, 6, seed=3, shift=0.4)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 6 + 1) ** 3)

    within_x = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y)[0] == pytest.approx(within_x + within_y - 2 * between, rel=1e-10)


@pytest.mark.parametrize("distance", [fid, kid])
@pytest.mark.parametrize("m", [5, 30])
def test_replicates_are_distances_of_resampled_sets(distance, m):
    x, y = _sample(8, 6), _sample(m, 6, seed=4)
    draws = bootstrap_indices(8, 5, seed=0)
    value, replicates = distance(x, y, draws)
    assert value == pytest.approx(distance(x, y)[0])
    assert replicates == pytest.approx([distance(x[rows], y)[0] for rows in draws], rel=1e-9)
    assert len(set(replicates.round(9))) == 5


def test_score_of_covers_the_truth_at_its_level():
    hits = 0
    for seed in range(300):
        values = np.random.default_rng(seed).normal(5, 2, 40)
        score = score_of(values.mean(), values[bootstrap_indices(40, 200, seed)].mean(1), 0.9)
        assert score.low < score.value < score.high
        hits += score.low <= 5 <= score.high
    assert 0.82 < hits / 300 < 0.95


def test_wilson_matches_published_intervals():
    # Newcombe 1998, table I, method 3: 81 of 263 and 0 of 20 at 95 %.
    assert wilson(81, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20, 0.95) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20, 0.95)[1] == 1
