import numpy as np
import pytest
from PIL import Image

from lsast.images.canvas import Canvas

SIZES = [(512, 512), (1200, 800), (800, 1200), (50, 2000), (2000, 50), (1, 1), (7, 5), (1, 5000), (513, 511)]


@pytest.mark.parametrize("own", SIZES)
@pytest.mark.parametrize(("size", "multiple"), [(512, 64), (256, 64), (200, 8)])
def test_canvas_fit_is_legal_and_near_the_size(own, size, multiple):
    canvas = Canvas.fit(own, size, multiple)
    for side in (0, 1):
        assert canvas.outer[side] % multiple == 0
        assert 0 <= canvas.outer[side] - canvas.inner[side] < multiple
    if max(own) / min(own) <= (size / multiple) ** 2:
        scale = size / (own[0] * own[1]) ** 0.5
    else:  # so long that the shorter side would not fill one multiple: the canvas is bounded instead
        assert canvas.outer[0] * canvas.outer[1] <= size * size
        scale = canvas.inner[np.argmax(own)] / max(own)
    assert canvas.inner == pytest.approx([max(1, side * scale) for side in own], abs=0.51)


@pytest.mark.parametrize("own", SIZES)
def test_canvas_of_the_own_size_does_not_resample(own):
    rgb = np.random.default_rng(0).integers(0, 256, (*own, 3), dtype=np.uint8)
    canvas = Canvas.fit(own, 0, 64)
    assert canvas.inner == own
    np.testing.assert_array_equal(canvas.crop(canvas.pad(rgb)), rgb)


@pytest.mark.parametrize("own", [(100, 60), (60, 100), (64, 64), (1, 1), (65, 129)])
def test_canvas_crop_shows_nothing_of_the_margin(own):
    rgb = np.full((*own, 3), 90, np.uint8)
    canvas = Canvas.fit(own, 256, 64)
    marked = np.full((*canvas.outer, 3), 255, np.uint8)
    # The margin, found from the outside: the picture is in the middle, spare odd pixels go below and right.
    top, left = [(outer - inner) // 2 for outer, inner in zip(canvas.outer, canvas.inner, strict=True)]
    marked[top : top + canvas.inner[0], left : left + canvas.inner[1]] = 90
    np.testing.assert_array_equal(canvas.crop(marked), rgb)


def test_canvas_pad_mirrors_the_picture():
    rgb = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    placed = Canvas.fit((6, 10), 0, 8).pad(rgb)
    assert placed.shape == (8, 16, 3)
    np.testing.assert_array_equal(placed[1:7, 3:13], rgb)
    np.testing.assert_array_equal(placed[0, 3:13], rgb[0])
    np.testing.assert_array_equal(placed[1:7, 0:3], rgb[:, 2::-1])
    np.testing.assert_array_equal(placed[1:7, 13:16], rgb[:, :-4:-1])


def test_canvas_pad_scales_by_lanczos():
    rgb = np.zeros((90, 180, 3), np.uint8)
    rgb[30:60, 60:120] = 255
    canvas = Canvas.fit((90, 180), 64, 8)
    assert canvas.inner == (45, 91)
    expected = np.asarray(Image.fromarray(rgb).resize((91, 45), Image.Resampling.LANCZOS))
    placed = canvas.pad(rgb)
    top, left = (48 - 45) // 2, (96 - 91) // 2
    np.testing.assert_array_equal(placed[top : top + 45, left : left + 91], expected)
