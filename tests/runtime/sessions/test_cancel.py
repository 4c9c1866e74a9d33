"""Stopping a painting and looking at it meanwhile: from threads, callbacks and asyncio."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import lsast
from lsast import CancelledError, CancelToken, UsageError
from lsast_engines.bundle.bundle import EMBEDDED


def test_cancel_token_stops_before_the_next_step(stylizer, photo):
    expected, token = stylizer.stylize(photo).image, CancelToken()
    reported: list[int] = []

    def on_step(step: int, total: int, preview: object) -> None:
        reported.append(step)
        if step == 2:
            token.cancel()

    with pytest.raises(CancelledError, match="cancelled"):
        stylizer.stylize(photo, on_step=on_step, cancel=token)
    assert reported == [0, 1, 2]
    assert token.cancelled
    with pytest.raises(CancelledError):
        stylizer.stylize(photo, cancel=token, on_step=lambda *_: pytest.fail("it was begun"))
    np.testing.assert_array_equal(stylizer.stylize(photo, cancel=CancelToken()).image, expected)


def test_cancel_token_stops_a_waiting_painting_while_another_goes_on(stylizer, photo):
    begun, go_on, token = threading.Event(), threading.Event(), CancelToken()

    def hold(*_: object) -> None:
        begun.set()
        go_on.wait()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stylizer.stylize, photo, on_step=hold)
        begun.wait()
        second = pool.submit(stylizer.stylize, photo, cancel=token)
        token.cancel()
        with pytest.raises(CancelledError):
            second.result(timeout=30)
        assert not first.done()
        go_on.set()
        first.result(timeout=30)


def test_cancel_token_stops_a_stream(stylizer, photo):
    token = CancelToken()
    stream = stylizer.stylize_many([photo] * 6, batch=2, cancel=token)
    next(stream)
    next(stream)
    token.cancel()
    with pytest.raises(CancelledError):
        next(stream)


def test_stylize_async_gives_the_same_without_blocking_the_loop(stylizer, photo):
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    async def paint() -> list[lsast.Result]:
        clock = asyncio.create_task(tick())
        results = await asyncio.gather(
            *(stylizer.stylize_async(photo, style, seed=3, on_step=lambda *_: time.sleep(0.01)) for style in STYLES)
        )
        clock.cancel()
        return results

    with pytest.raises(UsageError, match="picasso"):
        asyncio.run(stylizer.stylize_async(photo, "picasso"))
    with pytest.raises(UsageError, match="found cancel in stylize_async; expected none: cancel the task instead"):
        asyncio.run(stylizer.stylize_async(photo, cancel=lsast.CancelToken()))
    for style, result in zip(STYLES, asyncio.run(paint()), strict=True):
        np.testing.assert_array_equal(result.image, stylizer.stylize(photo, style, seed=3).image)
    assert ticks > 10


STYLES = ["vangogh", "monet", "vangogh+monet"]


def test_stylize_async_with_a_callback_that_raises_stop_iteration_ends(stylizer, photo):
    painting = stylizer.stylize_async(photo, on_step=lambda *_: next(iter(())))
    with pytest.raises(RuntimeError, match="a callback raised StopIteration"):
        asyncio.run(asyncio.wait_for(painting, 20))


def test_stylize_async_cancelled_stops_its_painting_and_drops_queued_ones(stylizer, photo):
    steps: list[tuple[int, int]] = []

    async def scene() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_step(step: int, total: int, preview: object) -> None:
            steps.append((total, step))
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.05)

        first = asyncio.create_task(stylizer.stylize_async(photo, steps=100, strength=1.0, on_step=on_step))
        second = asyncio.create_task(stylizer.stylize_async(photo, on_step=on_step))
        await begun.wait()
        for task in (second, first):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        seen = len(steps)
        await asyncio.sleep(0.2)
        assert len(steps) <= seen + 1, "it goes on unseen"  # the step that was under way may still tell of itself

    asyncio.run(scene())
    assert {total for total, _ in steps} == {100}, "the second was begun"
    assert len(steps) < 50
    stylizer.stylize(photo)


@pytest.mark.parametrize(
    ("own", "size", "fit", "cells"),
    [
        ((96, 160), 0, "aspect", (12, 20)),  # a canvas of 128 x 192: 16 pixels of margin above and below, 16 aside
        ((64, 64), 0, "aspect", (8, 8)),
        ((50, 70), 0, "aspect", (8, 10)),  # rows 7 … 56 of 64 lie in cells 0 … 7, columns 29 … 98 of 128 in 3 … 12
        ((96, 160), 128, "stretch", (16, 16)),
    ],
)
def test_preview_shows_the_picture_without_the_margin(stylizer, own, size, fit, cells):
    rgb = np.random.default_rng(1).integers(0, 256, (*own, 3), dtype=np.uint8)
    shown: list[Image.Image] = []
    stylizer.stylize(rgb, size=size, fit=fit, on_step=lambda step, total, preview: shown.append(preview()))
    assert {(image.height, image.width) for image in shown} == {cells}
    assert shown[0].mode == "RGB"


def test_preview_after_the_last_step_is_the_painting_scaled_down():
    """On the embedded base, whose decoder undoes its encoder: the yardstick is the decoded painting itself."""
    photo = Path(__file__).parents[3] / "docs" / "images" / "lighthouse.jpg"
    with Image.open(photo) as image:
        rgb = np.asarray(image.convert("RGB").resize((128, 128)))
    shown: list[np.ndarray] = []
    with lsast.load(EMBEDDED, backend="onnxruntime", threads=1) as mini:
        options: dict[str, Any] = {"steps": 8, "strength": 0.75, "size": 0, "guidance": 1.0}
        result = mini.stylize(rgb, **options, on_step=lambda step, total, look: shown.append(np.asarray(look())))
    small = cv2.resize(np.asarray(result.image), (16, 16), interpolation=cv2.INTER_AREA).astype(float)
    errors = [np.abs(preview - small).mean() for preview in shown]
    assert np.corrcoef(shown[-1].ravel(), small.ravel())[0, 1] > 0.8
    assert errors[-1] < 25
    assert errors[-1] < errors[1], "what is about to be gets nearer to what is"
