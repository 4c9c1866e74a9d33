from __future__ import annotations

import numpy as np
import torch

from lsast_engines.diffusion.solvers import guide

NULL, STYLE = np.random.default_rng(0).standard_normal((2, 1, 4, 2, 3)).astype(np.float32)


def test_guide_of_two_rows_matches_the_formula() -> None:
    exact = NULL.astype(np.float64) + 7.5 * (STYLE.astype(np.float64) - NULL)
    found = guide(np.stack([NULL, STYLE]), 7.5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    tensors = guide((torch.from_numpy(NULL), torch.from_numpy(STYLE)), 7.5)
    np.testing.assert_allclose(tensors.numpy(), found, rtol=1e-6, atol=1e-6)


def test_guide_of_one_row_gives_it_unchanged() -> None:
    assert guide((STYLE,), 7.5) is STYLE
