from __future__ import annotations

import torch

from lsast_train.training.rng import RngStream, rng_for


def test_rng_for_other_streams_and_numbers_differs() -> None:
    keys = [(seed, purpose, *rest) for seed in (0, 1) for purpose in RngStream for rest in ((), (1,), (0, 1), (1, 1))]
    drawn = {torch.rand(1, generator=rng_for(*key), dtype=torch.float64).item() for key in keys}
    assert len(drawn) == len(keys)
    assert torch.rand(1, generator=rng_for(*keys[7])) == torch.rand(1, generator=rng_for(*keys[7]))
