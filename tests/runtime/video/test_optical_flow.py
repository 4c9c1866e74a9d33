from itertools import pairwise

import cv2
import numpy as np

from lsast.video.optical_flow import Motion, TemporalState

SHIFT = (3.0, -2.0)
"""How far the surface of every pixel of a moved picture was to the right and down, one frame earlier."""


def _texture(height: int, width: int) -> np.ndarray:
    """Smooth random blobs, which have structure everywhere."""
    noise = np.random.default_rng(5).standard_normal((height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    return np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def _moved(large: np.ndarray, frame: int) -> np.ndarray:
    """Frame [128, 160, 3] of a clip: a window that goes by SHIFT a frame."""
    x, y = (round(20 + frame * step) for step in SHIFT)
    return np.ascontiguousarray(large[y : y + 128, x : x + 160])


def test_motion_between_finds_the_shift_of_a_window():
    large = _texture(200, 240)
    motion = Motion.between(_moved(large, 0), _moved(large, 1))
    inner = motion.backward_flow[16:-16, 16:-16]
    np.testing.assert_allclose(inner.reshape(-1, 2).mean(0), SHIFT, atol=0.02)
    assert np.abs(inner - SHIFT).mean() < 0.05
    assert motion.valid[16:-16, 16:-16].mean() > 0.99
    assert (motion.valid[:, -3:] == 0).all(), "was outside"
    assert (motion.valid[:2] == 0).all(), "was outside"


def test_motion_between_marks_uncovered_pixels_invalid():
    large = _texture(200, 240)
    before, now = _moved(large, 0), _moved(large, 0)
    patch = _texture(260, 200)[200:240, 100:140]
    before[40:80, 40:80] = patch
    now[40:80, 50:90] = patch  # moved to the right by 10
    motion = Motion.between(before, now)
    assert motion.valid[44:76, 42:48].mean() < 0.2  # uncovered
    assert motion.valid[46:74, 58:82].mean() > 0.9
    assert motion.valid[100:].mean() > 0.95


def test_motion_downsampled_is_in_cells():
    backward_flow = np.tile(np.array([4.0, -8.0], np.float32), (64, 96, 1))
    valid = np.zeros((64, 96), np.float32)
    valid[:, :44] = 1
    cells = Motion(backward_flow, valid).downsampled(8)
    np.testing.assert_allclose(cells.backward_flow, np.tile([0.5, -1.0], (8, 12, 1)))
    np.testing.assert_allclose(cells.valid[0], [1, 1, 1, 1, 1, 0.5, 0, 0, 0, 0, 0, 0])


def test_stylize_frames_follows_the_painting_before_until_the_size_changes(stylizer):
    """The difference of two paintings along a motion that is known is below half of that of frames painted alone."""
    large = _texture(200, 240)
    frames = [*(_moved(large, k) for k in range(4)), large[:128, :128]]
    options = {"size": 0, "guidance": 1.0}
    followed = [np.asarray(result.image) for result in stylizer.stylize_frames(frames, **options)]
    alone = [np.asarray(stylizer.stylize(frame, **options).image) for frame in frames]
    for first in (0, 4):
        np.testing.assert_array_equal(followed[first], alone[first])
    x, y = (round(step) for step in SHIFT)

    def error(clip: list[np.ndarray]) -> float:
        moved = [(now[8:-8, 8:-8], before[8 + y : y - 8, 8 + x : x - 8]) for before, now in pairwise(clip[:4])]
        return float(np.mean([np.abs(now.astype(int) - before).mean() for now, before in moved]))

    assert error(alone) > 2, "paintings that agree anyway prove nothing"
    assert error(followed) < 0.5 * error(alone)


def test_temporal_state_with_weight_0_changes_nothing_and_restores(stylizer):
    large = _texture(200, 240)
    frames = [_moved(large, k) for k in range(4)]
    options = {"size": 64, "guidance": 1.0, "style": "monet"}

    def paint(frames: list[np.ndarray], temporal: TemporalState) -> list[np.ndarray]:
        return [np.asarray(r.image) for r in stylizer.stylize_frames(frames, temporal=temporal, **options)]

    for frame, painting in zip(frames, paint(frames, TemporalState(latent_weight=0.0, pixel_weight=0.0)), strict=True):
        np.testing.assert_array_equal(painting, np.asarray(stylizer.stylize(frame, **options).image))
    whole, first, second = paint(frames, TemporalState()), TemporalState(), TemporalState()
    parts = paint(frames[:2], first)
    second.restore(first.state())
    np.testing.assert_array_equal(np.stack(parts + paint(frames[2:], second)), np.stack(whole))
