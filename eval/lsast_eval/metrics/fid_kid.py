"""FID and KID between two sets of features."""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .intervals import Floats


def fid(x: Floats, y: Floats, draws: Iterable[npt.NDArray[np.int64]] = ()) -> tuple[float, Floats]:
    """Squared Fréchet distance of the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6: FID).

    ``|mx − my|² + tr(Sx + Sy − 2 (Sx Sy)^½)`` with unbiased covariances. The trace of the root is the sum of the
    singular values of ``Xc Ycᵀ / √((n−1)(m−1))``, Xc and Yc being the centred features: no root of a D × D matrix,
    which would be singular wherever there are fewer pictures than features.

    Args:
        x: [n, D] float64, n at least 2.
        y: [m, D] float64, m at least 2.
        draws: resamplings of x, each [n] of row numbers.

    Returns:
        The distance, and the distance of every resampling, [draws].
    """
    mean = y.mean(0)
    x, y = x - mean, y - mean
    spread_y = float(np.square(y).sum()) / (len(y) - 1)
    root_y = np.asarray(np.linalg.qr(y, mode="r")) if len(y) > y.shape[1] else y
    cross, gram = x @ root_y.T, x @ x.T  # [n, min(m, D)], [n, n]: all that a resampling needs

    def distance(rows: npt.NDArray[np.int64]) -> float:
        n = len(rows)
        square_mean = float(gram[np.ix_(rows, rows)].mean())
        spread_x = (float(gram[rows, rows].sum()) - n * square_mean) / (n - 1)
        part = cross[rows]
        part = part - part.mean(0)
        singular = np.linalg.svd(part, compute_uv=False)
        overlap = float(singular.sum()) / math.sqrt((n - 1) * (len(y) - 1))
        return max(square_mean + spread_x + spread_y - 2 * overlap, 0.0)

    return distance(np.arange(len(x))), np.array([distance(rows) for rows in draws], dtype=np.float64)


def kid(x: Floats, y: Floats, draws: Iterable[npt.NDArray[np.int64]] = ()) -> tuple[float, Floats]:
    """Unbiased squared maximum mean discrepancy with ``k(a, b) = (a·b / D + 1)³`` (Bińkowski et al. 2018: KID).

    Over all pictures at once: the usual average over subsets of 1000 is for sets too large for that. May be negative.
    Arguments and results are as those of `fid`.
    """
    n, m, dim = len(x), len(y), x.shape[1]

    k_xx, k_xy, k_yy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (x, y), (y, y)))
    across = k_xy.mean(1)
    within_y = float(k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))

    def discrepancy(rows: npt.NDArray[np.int64]) -> float:
        within_x = float(k_xx[np.ix_(rows, rows)].sum() - k_xx[rows, rows].sum()) / (n * (n - 1))
        return within_x + within_y - 2 * float(across[rows].mean())

    return discrepancy(np.arange(n)), np.array([discrepancy(rows) for rows in draws], dtype=np.float64)
