"""A score with its interval: bootstrap over pictures, and Wilson's for a share."""

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
"""Confidence level of all intervals."""


@dataclass(frozen=True)
class Score:
    """A figure with its interval."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    replicates: Floats = field(repr=False, compare=False)
    """The score of every resampling [bootstrap], shifted so that their mean is `value`.

    All scores of a report are resampled alike, so replicates of two methods may be subtracted one by one.
    """


def score_of(value: float, replicates: Floats, confidence: float = CONFIDENCE) -> Score:
    """A score with the percentile interval of its replicates, which are centred on the value first.

    A resampling holds pictures twice. That pushes distances between sets up (as a smaller sample would), a bias that
    the value itself does not have; centring takes it out.
    """
    centred = replicates - replicates.mean() + value
    low, high = np.quantile(centred, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Score(float(value), float(low), float(high), centred)


def bootstrap_indices(count: int, times: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices drawn with repetition, [times, count]."""
    return np.random.default_rng(seed).integers(0, count, (times, count))


def wilson(successes: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of a share, by Wilson (1927): sensible also for 0 and for all of a few.

    `successes` are 0 to `count`, with halves for ties; `count` is at least 1, `confidence` above 0 and below 1.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # The formula gives 0 and 1 exactly at the ends, but for rounding.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == count else centre + half)
