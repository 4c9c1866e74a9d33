import cv2
import numpy as np
import pytest

from lsast_eval.metrics.content import edge_f1, flat_gradient, resized, shrunk, ssim

from ..conftest import scene


def test_ssim_is_wangs_formula_in_every_whole_window():
    """As plain sums of BT.601 luma; torchmetrics' map agrees to 1e-11 inside the rim, which it counts too."""
    one, two = scene(1), cv2.GaussianBlur(scene(1), (0, 0), 2)
    x, y = (rgb @ np.array([0.299, 0.587, 0.114]) for rgb in (one, two))
    r = np.arange(-5, 6)
    taps = np.exp(-(r**2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        return (np.lib.stride_tricks.sliding_window_view(values, (11, 11)) * window).sum((-1, -2))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(one, two) == pytest.approx(expected.mean(), abs=1e-9)


def _line(column: int) -> np.ndarray:
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[:, column:] = 255
    return rgb


@pytest.mark.parametrize(("moved", "expected"), [(0, 1.0), (2, 1.0), (3, 0.0)])
def test_edges_may_move_by_the_tolerance_and_no_further(moved, expected):
    assert edge_f1(_line(30), _line(30 + moved), tolerance=2) == expected


def test_edge_f1_is_the_harmonic_mean_of_precision_and_recall():
    both = _line(20)
    both[:, 44:] = 0  # a second edge, which the content does not have: precision 1/2, recall 1
    assert edge_f1(_line(20), both) == pytest.approx(2 / 3, abs=0.01)
    assert edge_f1(both, _line(20)) == pytest.approx(2 / 3, abs=0.01)
    flat = np.full((40, 40, 3), 90, np.uint8)
    assert edge_f1(flat, flat + 60) == ssim(flat, flat) == 1
    assert edge_f1(flat, _line(20)[:40, :40]) == 0


def test_resized_averages_where_it_shrinks():
    wide = np.zeros((100, 150, 3), np.uint8)
    assert (shrunk(wide, 64).shape, resized(wide, 30, 200).shape) == ((64, 96, 3), (30, 200, 3))
    assert shrunk(wide, 512) is wide
    checks = (np.indices((64, 64)).sum(0)[:, :, None].repeat(3, 2) % 2 * 255).astype(np.uint8)
    assert np.abs(resized(checks, 32, 32).astype(int) - 127.5).max() <= 1


def test_flat_gradient_is_that_of_the_flattest_quarter():
    rgb = np.full((513, 513, 3), 90, np.uint8)
    rgb[:, 200:] += np.indices((513, 313)).sum(0)[:, :, None].astype(np.uint8) % 2 * 40
    assert flat_gradient(rgb) < 0.05
    stripes = np.full((512, 512, 3), 90, np.uint8)
    stripes[:, ::2] += 6
    assert flat_gradient(stripes) == pytest.approx(6, rel=1e-6)
    assert flat_gradient(rgb[:20]) >= 0
