"""Random numbers that depend on the seed and on what they are for, and on nothing else.

So nothing random has to be stored in a checkpoint: a resumed run repeats the numbers of an uninterrupted one.
"""

from enum import IntEnum

import numpy as np
import torch


class RngStream(IntEnum):
    """What random numbers are for; each use has a stream of its own."""

    STEP = 1
    TRAINING_CROPS = 2
    VALIDATION_CROPS = 3
    INITIAL_CONTEXT = 4
    VALIDATION_NOISE = 5
    DROPOUT = 6
    TEACHER = 7
    TEACHER_NOISED = 8
    CONTENT = 9


def rng_for(seed: int, stream: RngStream, *numbers: int) -> torch.Generator:
    """A CPU generator for `seed`, `stream` and `numbers` (all at least 0), e.g. the process and the step."""
    state = np.random.SeedSequence([seed, stream, *numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
