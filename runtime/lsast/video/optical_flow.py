"""Frames of a video painted so that strokes move with what they are painted on.

Every frame gets the same noise. Where optical flow finds a frame's surface in the frame before, the latent of that
frame's painting, warped along the flow, is what every step of the new one is drawn to. A decoder knows cells of 8 x 8
pixels, and what it paints of a latent that moved by half a cell is not what it painted, moved by half a cell; so the
pixels of the painting before are mixed in, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lsast_engines.diffusion.solvers import Solver
from lsast_engines.diffusion.timesteps import TimestepSchedule

from ..images.canvas import Pixels
from ..sampling.sampler import Floats, to_pixels
from ..sampling.x0_blend import X0Blend

Field = npt.NDArray[np.float32]

_ALIKE = 20.0
"""Mean absolute difference, in grey levels, beyond which a pixel shows another surface than one frame earlier."""


@dataclass(frozen=True, kw_only=True)
class Coherence:
    """How firmly a frame follows the painting before it."""

    hold: float = 0.85
    """Share of the latent before in what every step takes the clean latent to be, 0 to 1."""
    blend: float = 0.5
    """Share of the painting before, moved, in the pixels of the new one, 0 to 1."""


@dataclass(frozen=True)
class Motion:
    """Where the surface of each pixel was one frame earlier."""

    back: Field
    """[H, W, 2]: how far to the right and down, in pixels, a pixel's surface was in the frame before."""
    seen: Field
    """[H, W]: 1 where it was visible there, 0 where it was hidden or outside."""

    @classmethod
    def between(cls, before: Pixels, now: Pixels) -> Motion:
        """Estimate by dense inverse search (Kroeger et al. 2016), there and back: [H, W, 3] each.

        What was seen is where both ways cancel, |b + f|² < 0.01 (|b|² + |f|²) + 0.5 (Sundaram et al. 2010, eq. 5), and
        where the frame before, moved, looks like this one: to `_ALIKE` grey levels after a blur.
        """
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, now)]
        search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        # Down to full resolution and smoother than the preset: a third of its error on a turning picture (0.03 px
        # against 0.10), and half as much motion where nothing moves.
        search.setFinestScale(0)
        search.setVariationalRefinementIterations(20)
        search.setVariationalRefinementAlpha(60.0)
        back = search.calc(grey[1], grey[0], None)
        forth = warped(search.calc(grey[0], grey[1], None), back)
        lengths = (back**2).sum(2) + (forth**2).sum(2)
        cancel = ((back + forth) ** 2).sum(2) < 0.01 * lengths + 0.5
        apart = np.abs(now - warped(before.astype(np.float32), back)).mean(2)
        alike = cv2.GaussianBlur(apart, (0, 0), 2) < _ALIKE
        return cls(back, (cancel & alike & _inside(back)).astype(np.float32))

    def shrunk(self, factor: int) -> Motion:
        """The same by cells of factor * factor pixels, lengths in cells."""
        size = (self.seen.shape[1] // factor, self.seen.shape[0] // factor)
        back, seen = (cv2.resize(field, size, interpolation=cv2.INTER_AREA) for field in (self.back, self.seen))
        return Motion(back / np.float32(factor), seen)


def warped(values: Field, back: Field) -> Field:
    """Fetch values [H, W, C] from where `back` [H, W, 2] says each pixel was; the rim goes on beyond it."""
    y, x = np.mgrid[0 : back.shape[0], 0 : back.shape[1]].astype(np.float32)
    moved: Field = cv2.remap(
        values, x + back[..., 0], y + back[..., 1], cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE
    )
    return moved.reshape(values.shape)


def _inside(back: Field) -> npt.NDArray[np.bool_]:
    height, width = back.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    to_x, to_y = x + back[..., 0], y + back[..., 1]
    inside: npt.NDArray[np.bool_] = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    return inside


class Follower:
    """Remembers the last frame and its painting, and leads the next frame's painting by them."""

    def __init__(self, coherence: Coherence | None = None) -> None:
        self._coherence = coherence or Coherence()
        self._content: Pixels | None = None
        self._latent: Floats | None = None
        self._painted: Pixels | None = None
        self._motion: Motion | None = None

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What is remembered, for `restore`: empty before the first frame."""
        if self._content is None or self._latent is None or self._painted is None:
            return {}
        return {"content": self._content, "latent": self._latent, "painted": self._painted}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from a `state`."""
        self._content, self._latent, self._painted = (state.get(name) for name in ("content", "latent", "painted"))

    def begin(self, content: Pixels, factor: int, solver: Solver, schedule: TimestepSchedule) -> Solver:
        """The solver to paint a frame with.

        Args:
            content: the frame on its canvas, [H, W, 3].
            factor: pixels along a side of a latent cell.
            solver: what it would be painted with alone.
            schedule: the steps that it takes.
        """
        before, self._content, self._motion = self._content, content, None
        if before is None or self._latent is None or before.shape != content.shape:
            return solver
        self._motion = Motion.between(before, content)
        cells = self._motion.shrunk(factor)
        latent = warped(self._latent.transpose(1, 2, 0), cells.back).transpose(2, 0, 1)
        return X0Blend(solver, schedule, latent, np.float32(self._coherence.hold) * cells.seen)

    def end(self, z: Floats, painted: Pixels) -> Pixels:
        """The canvas to give back, [H, W, 3], given the latent [4, h, w] that was painted and what it decodes to."""
        self._latent = z.copy()
        if self._motion is not None and self._painted is not None:
            share = np.float32(self._coherence.blend) * self._motion.seen[..., None]
            there = warped(self._painted.astype(np.float32), self._motion.back)
            painted = to_pixels(np.float32(1) * painted + share * (there - painted))
        self._painted = painted
        return painted
