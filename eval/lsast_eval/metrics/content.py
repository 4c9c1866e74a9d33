"""Measures on pixels: how much of the content is left, in luminance and edges, and how rough the flat parts are."""

import numpy as np
import numpy.typing as npt

from lsast_engines.images import canny_edges, import_opencv

Pixels = npt.NDArray[np.uint8]

_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
"""Window, its deviation, and the two constants of Wang et al. 2004, section III.C."""


def resized(rgb: Pixels, height: int, width: int) -> Pixels:
    """Bring [H, W, 3] to [height, width, 3]: averaging where it shrinks, cubic where it grows."""
    cv2 = import_opencv()
    if rgb.shape[:2] == (height, width):
        return rgb
    shrinks = height * width < rgb.shape[0] * rgb.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(rgb), (width, height), interpolation=how), dtype=np.uint8)


def shrunk(rgb: Pixels, size: int) -> Pixels:
    """Bring the shorter side down to `size`; a smaller picture stays as it is."""
    height, width = rgb.shape[:2]
    scale = size / min(height, width)
    return rgb if scale >= 1 else resized(rgb, round(height * scale), round(width * scale))


def luminance(rgb: Pixels) -> npt.NDArray[np.float64]:
    """BT.601 luma Y' of 8-bit RGB, float64 in [0, 255], [H, W]."""
    return np.asarray(rgb @ np.array([0.299, 0.587, 0.114]), dtype=np.float64)


def ssim(content: Pixels, result: Pixels) -> float:
    """Mean structural similarity of the luminance (Wang et al. 2004): 1 for equal pictures, about 0 for unrelated.

    Of two pictures [H, W, 3] of one shape, both sides at least 11. Gaussian window of 11 pixels and deviation 1.5,
    population moments; the border that the window does not fill is left out.
    """
    cv2 = import_opencv()
    taps = cv2.getGaussianKernel(_WINDOW, _SIGMA, cv2.CV_64F)
    rim = _WINDOW // 2

    def blurred(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        whole = cv2.sepFilter2D(values, cv2.CV_64F, taps, taps)
        return np.asarray(whole[rim:-rim, rim:-rim], dtype=np.float64)

    x, y = luminance(content), luminance(result)
    mean_x, mean_y = blurred(x), blurred(y)
    var_x = blurred(x * x) - mean_x**2
    var_y = blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def edge_f1(content: Pixels, result: Pixels, tolerance: float = 2.0) -> float:
    """How well Canny's edges of the result and of the content meet: 1 where every edge has one within `tolerance`.

    Harmonic mean of the share of the result's edge pixels that have an edge of the content within `tolerance` pixels
    (Euclidean), and of the share of the content's that have one of the result; both are [H, W, 3], of one
    shape. Two pictures without edges agree: 1.
    """
    one, two = canny_edges(content), canny_edges(result)
    if not one.any() or not two.any():
        return float(one.any() == two.any())
    precision = float((_distance_to(one)[two > 0] <= tolerance).mean())
    recall = float((_distance_to(two)[one > 0] <= tolerance).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def flat_gradient(rgb: Pixels) -> float:
    """How rough the flattest parts are: mean |∂y| + |∂x| of the luminance, in grey levels a pixel, over the flattest
    quarter of the picture's blocks of 16x16 pixels, at 512² pixels. A decoder that prints a pattern raises it.
    """
    height, width = rgb.shape[:2]
    scale = (512 * 512 / (height * width)) ** 0.5
    grey = luminance(resized(rgb, max(round(height * scale), 17), max(round(width * scale), 17)))
    gradient = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    rows, columns = (side // 16 for side in gradient.shape)
    blocks = gradient[: 16 * rows, : 16 * columns].reshape(rows, 16, columns, 16).mean((1, 3)).ravel()
    return float(np.sort(blocks)[: max(len(blocks) // 4, 1)].mean())


def _distance_to(edges: Pixels) -> npt.NDArray[np.float32]:
    cv2 = import_opencv()
    whole = cv2.distanceTransform((edges == 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(whole, dtype=np.float32)
