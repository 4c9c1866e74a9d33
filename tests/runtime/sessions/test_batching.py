"""Many pictures at once: each as if it were alone, in order, and read no further ahead than was said."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import lsast
from lsast import PictureError, Stylizer, UsageError
from lsast.sessions import batching
from lsast_engines.bundle.location import EMBEDDED


@pytest.fixture
def stylizer(split_stylizer: Stylizer) -> Stylizer:
    return split_stylizer


def _pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def _close(found: lsast.Result, expected: lsast.Result) -> None:
    # The last bit of a sum may differ with the batch, and so, at a border, a grey level.
    difference = np.abs(np.asarray(found.image).astype(int) - np.asarray(expected.image))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert found.options == expected.options


ROWS: list[dict[str, Any]] = [
    {"seed": 1},
    {"style": "monet", "solver": "unipc"},
    {"style": "vangogh:0.3@up+monet", "guidance": 5.0, "solver": "dpmpp2m"},
    {"steps": 20, "strength": 0.35},
    {"steps": 14, "strength": 0.5, "keep_colour": True},
]


def test_stylize_many_paints_each_row_with_its_own_options_in_one_batch(stylizer, photo, runs):
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[20:70] = 255
    rows = [*ROWS, {"mask": mask, "seed": 8}]
    many = list(stylizer.stylize_many([photo] * 6, rows=rows, batch=6))
    assert [len(run.latents) for run in runs] == [6]
    for row, result in zip(rows, many, strict=True):
        alone = stylizer.stylize(photo, **row)
        _close(result, alone)
        assert list(result.seconds) == list(alone.seconds)
    assert len({np.asarray(result.image).tobytes() for result in many}) == 6


def test_stylize_many_groups_sizes_and_keeps_the_order(stylizer, runs):
    pictures = _pictures((64, 64), (96, 160), (64, 64), (64, 128), (96, 160), (64, 64), (64, 64))
    results = list(stylizer.stylize_many(iter(pictures), ["monet"] * 7, batch=3, size=0))
    assert [result.image.size[::-1] for result in results] == [picture.shape[:2] for picture in pictures]
    for picture, result in zip(pictures, results, strict=True):
        _close(result, stylizer.stylize(picture, "monet", size=0))
    assert [len(run.latents) for run in runs[:4]] == [3, 2, 1, 1]


def test_stylize_many_shares_no_batch_between_unlike_options(stylizer, photo, runs):
    half, cached, small = {"control_scale": 0.5}, {"cache_interval": 2}, {"decoder": "small"}
    others: list[dict[str, Any]] = [{"guidance": 1.0}, {"steps": 20}]
    rows = [half, *others, half, {}, cached, {**cached, "seed": 9}, small]
    many = list(stylizer.stylize_many([photo] * 8, rows=rows, batch=8))
    assert [len(run.latents) for run in runs] == [2, 1, 1, 1, 2, 1]
    for row, result in zip(rows, many, strict=True):
        _close(result, stylizer.stylize(photo, **row))


def test_stylize_many_reads_no_further_ahead_than_it_must(stylizer):
    read = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal read
        while True:
            read += 1
            yield np.full((64, 64, 3), read % 256, np.uint8)

    stream = stylizer.stylize_many(endless(), batch=2)
    assert read == 0
    for taken in range(1, 6):
        next(stream)
        assert read <= taken + 2
    read = 0
    odd = (rgb if read == 1 else np.tile(rgb, (1, 2, 1)) for rgb in endless())  # its first size never comes again
    next(stylizer.stylize_many(odd, batch=2, size=0))
    assert read == batching.AHEAD * 2


def test_stylize_many_raises_an_error_at_its_pictures_place(stylizer, photo):
    def broken() -> Iterator[np.ndarray]:
        yield from (photo, photo)
        raise ZeroDivisionError

    for pictures, error in (([photo, photo, b"no picture", photo], PictureError), (broken(), ZeroDivisionError)):
        stream = stylizer.stylize_many(pictures, batch=4)
        assert [type(next(stream)) for _ in range(2)] == [lsast.Result] * 2
        with pytest.raises(error):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_stylize_many_prefers_a_rows_options(stylizer, photo):
    styles, rows = ["vangogh", None, "monet"], [{}, {"seed": 2}, {"style": "vangogh"}]
    for columns in ((styles, rows), (np.array(styles), np.array(rows))):
        results = stylizer.stylize_many([photo] * 3, columns[0], rows=columns[1], style="monet", seed=1)
        assert [(result.options.style, result.options.seed) for result in results] == [
            ("vangogh", 1), ("monet", 2), ("vangogh", 1),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("styles", "rows", "words"),
    [
        (["monet"], None, "found 1 styles and more pictures"),
        (["monet"] * 3, None, "found 2 pictures and more styles or rows"),
        (None, [{}], "found 1 rows and more pictures"),
        ("monet", [{}] * 3, "found 2 pictures and more styles or rows"),
        (["monet"], [{}], "found 1 styles and rows and more pictures"),
    ],
)
def test_stylize_many_with_unequal_counts_raises(stylizer, photo, styles, rows, words):
    with pytest.raises(UsageError, match=words):
        list(stylizer.stylize_many([photo] * 2, styles, rows=rows))


class Reader:
    """A sequence by its indices alone, as readers of videos are."""

    def __getitem__(self, index: int) -> Any:
        raise IndexError


def test_stylize_many_of_nothing_is_empty_and_of_no_list_or_in_batches_of_0_is_refused(stylizer):
    assert list(stylizer.stylize_many([])) == []
    for pictures in ("photo.png", b"photo", None):
        with pytest.raises(UsageError, match=f"found {type(pictures).__name__} as pictures; expected a list"):
            list(stylizer.stylize_many(pictures))
        with pytest.raises(UsageError, match=f"found {type(pictures).__name__} as frames; expected a list"):
            next(stylizer.stylize_frames(pictures))
    with pytest.raises(UsageError, match="found int as rows; expected a list"):
        list(stylizer.stylize_many([], rows=3))
    assert list(stylizer.stylize_frames(Reader())) == []
    with pytest.raises(UsageError, match="found int as temporal"):
        next(stylizer.stylize_frames([], temporal=3))
    for batch in (0, float("nan")):
        with pytest.raises(UsageError, match=f"found a batch of {batch}"):
            stylizer.stylize_many([], batch=batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"control_scale": 0.5, "guidance": 1.0}, "in control_scale, whether guidance is 1; expected one batch_key"),
        ({"size": 64, "steps": 20, "cache_interval": 2}, "differ in cache_interval, painted size, steps;"),
        (3, "found int in requests"),
    ],
)
def test_paint_of_requests_that_share_no_batch_raises(stylizer, photo, others, words):
    other = stylizer.request(photo, **others) if isinstance(others, dict) else others
    with pytest.raises(UsageError, match=words):
        stylizer.paint(request for request in (stylizer.request(photo), other))


def test_paint_of_a_request_of_another_bundle_raises(stylizer, photo):
    with lsast.load(EMBEDDED, options={}) as mini, pytest.raises(UsageError, match="a request of another bundle"):
        stylizer.paint([mini.request(photo, size=64)])
    with pytest.raises(UsageError, match="found int as requests"):
        stylizer.paint(3)
