"""Frames of a video, painted so that strokes move with the surfaces that they lie on.

Every frame gets the same noise. Where optical flow finds the surface of a pixel in the frame before, every step blends
its predicted clean latent with the latent of that frame's painting, warped along the flow. A latent cell covers 8 x 8
pixels, so a latent that moved by half a cell does not decode to the painting moved by half a cell: the pixels of the
last painting are blended in as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lsast_engines.images import import_opencv

from ..images.canvas import Pixels
from ..sampling.batch import X0Blend
from ..sampling.networks import Floats, to_pixels

cv2 = import_opencv()

MAX_GREY_DIFF = 20.0
"""Mean absolute difference, in grey levels, beyond which a pixel shows another surface than one frame earlier."""


@dataclass(frozen=True)
class Motion:
    """Where the surface of each pixel was one frame earlier."""

    backward_flow: Floats
    """[H, W, 2]: how far to the right and down, in pixels, a pixel's surface was in the frame before."""
    valid: Floats
    """[H, W]: 1 where the surface was visible there, 0 where it was hidden or outside."""

    @classmethod
    def between(cls, before: Pixels, now: Pixels) -> Motion:
        """Estimate the motion between two frames [H, W, 3] by dense inverse search (Kroeger et al. 2016).

        The flow is valid where backward and forward flow cancel, |b + f|² < 0.01 (|b|² + |f|²) + 0.5 (Sundaram et al.
        2010, eq. 5), and where the frame before, moved, differs by less than `MAX_GREY_DIFF` after a blur.
        """
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, now)]
        search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        # Down to full resolution and smoother than the preset: less error, and less motion where nothing moves.
        search.setFinestScale(0)
        search.setVariationalRefinementIterations(20)
        search.setVariationalRefinementAlpha(60.0)
        back = search.calc(grey[1], grey[0], None)
        forth = warped(search.calc(grey[0], grey[1], None), back)
        lengths = (back**2).sum(2) + (forth**2).sum(2)
        cancel = ((back + forth) ** 2).sum(2) < 0.01 * lengths + 0.5
        apart = np.abs(now - warped(before.astype(np.float32), back)).mean(2)
        alike = cv2.GaussianBlur(apart, (0, 0), 2) < MAX_GREY_DIFF
        x, y = _sources(back)
        inside = (x >= 0) & (x <= x.shape[1] - 1) & (y >= 0) & (y <= y.shape[0] - 1)
        return cls(back, (cancel & alike & inside).astype(np.float32))

    def downsampled(self, factor: int) -> Motion:
        """The same by cells of factor * factor pixels, lengths in cells."""
        size = (self.valid.shape[1] // factor, self.valid.shape[0] // factor)
        fields = (self.backward_flow, self.valid)
        backward_flow, valid = (cv2.resize(field, size, interpolation=cv2.INTER_AREA) for field in fields)
        return Motion(backward_flow / np.float32(factor), valid)


def warped(values: Floats, flow: Floats) -> Floats:
    """Values [H, W, C] fetched from where the backward flow [H, W, 2] points; the rim is repeated beyond it."""
    x, y = _sources(flow).astype(np.float32)
    moved: Floats = cv2.remap(values, x, y, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE)
    return moved.reshape(values.shape)


def _sources(flow: Floats) -> npt.NDArray[np.float64]:
    """Column and row to which a backward flow [H, W, 2] leads from each pixel: [2, H, W]."""
    rows, columns = np.mgrid[0 : flow.shape[0], 0 : flow.shape[1]]
    return np.stack([columns + flow[..., 0], rows + flow[..., 1]])


class TemporalState:
    """The last frame of a video and its painting, which the painting of the next frame follows."""

    def __init__(self, *, latent_weight: float = 0.85, pixel_weight: float = 0.5) -> None:
        """Weights, 0 to 1, of the last painting's latent in every step's clean latent, and of its pixels."""
        self._weights = np.float32(latent_weight), np.float32(pixel_weight)
        self._last: dict[str, npt.NDArray[Any]] = {}
        self._motion: Motion | None = None
        self._content: Pixels

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that `restore` needs: `content` [H, W, 3], `latent` [4, h, w] and `painted` [H, W, 3] of the last
        frame; none before the first."""
        return self._last

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from a `state`."""
        self._last = dict(state)

    def begin(self, content: Pixels, factor: int) -> X0Blend | None:
        """Begin a frame: its x0 is blended with the last painting's latent, moved along the flow; None if there is no
        such painting of its size. `content` is the frame on its canvas, [H, W, 3], `factor` the number of pixels along
        a side of a latent cell."""
        self._content, self._motion = content, None
        if not self._last or self._last["content"].shape != content.shape:
            return None
        self._motion = Motion.between(self._last["content"], content)
        cells = self._motion.downsampled(factor)
        latent = warped(self._last["latent"].transpose(1, 2, 0), cells.backward_flow).transpose(2, 0, 1)
        return X0Blend(latent, self._weights[0] * cells.valid)

    def blend(self, latent: Floats, painted: Pixels) -> Pixels:
        """The canvas [H, W, 3] of a painted latent [4, h, w], blended with the last painting, moved along the flow."""
        if self._motion is not None:
            weight = self._weights[1] * self._motion.valid[..., None]
            moved = warped(self._last["painted"].astype(np.float32), self._motion.backward_flow)
            painted = to_pixels(np.float32(1) * painted + weight * (moved - painted))
        self._last = {"content": self._content, "latent": latent.copy(), "painted": painted}
        return painted
