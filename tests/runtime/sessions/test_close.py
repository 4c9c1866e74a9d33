"""Closing a stylizer, and the end of Python, at any moment: an error of ours, never a hang or an abort."""

import asyncio
import io
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import lsast
from lsast import CancelToken, Stylizer, UsageError
from lsast_engines.backends.registry import available_backends

CLOSED = "the stylizer is closed"
SECONDS = 60


def _in_thread(call: Callable[[], object]) -> None:
    """Call in another thread and wait for it, as a callback may."""
    other = threading.Thread(target=call)
    other.start()
    other.join(SECONDS)
    assert not other.is_alive(), "it hangs"


@pytest.mark.parametrize("how", ["close", "with", "thread", "twice", "signal"])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_close_inside_on_step_ends_the_painting(bundle_path, photo, how, at):
    stylizer = lsast.load(bundle_path)
    steps: list[int] = []

    def on_step(step: int, steps_in_all: int, preview: Callable[[], object]) -> None:
        steps.append(step)
        if step == at:
            if how == "with":
                with stylizer:
                    pass
            elif how == "thread":
                _in_thread(stylizer.close)
            elif how == "signal":
                before = signal.signal(signal.SIGINT, lambda *_: stylizer.close())
                signal.raise_signal(signal.SIGINT)
                signal.signal(signal.SIGINT, before)
            else:
                stylizer.close()
            if how == "twice":
                stylizer.close()
            assert not stylizer._pool.engines, "close frees at once"
            preview()

    with pytest.raises(UsageError, match=CLOSED):
        stylizer.stylize(photo, on_step=on_step)
    assert steps == [*range(at + 1)]
    with pytest.raises(UsageError, match=CLOSED):
        stylizer.stylize(photo)


def test_close_in_an_iterator_of_pictures_or_a_file_ends_the_stream(bundle_path, photo):
    class Closing(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            stylizer.close()
            return b""

    def pictures() -> Any:
        yield photo
        stylizer.close()
        yield photo

    for stream in (Stylizer.stylize_many, Stylizer.stylize_frames):
        with lsast.load(bundle_path) as stylizer, pytest.raises(UsageError, match=CLOSED):
            list(stream(stylizer, pictures()))
    with lsast.load(bundle_path) as stylizer, pytest.raises(lsast.LsastError):
        stylizer.stylize(Closing())


def test_close_in_another_thread_ends_the_painting_and_those_that_wait(bundle_path, photo):
    stylizer = lsast.load(bundle_path)
    begun, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        begun.set()
        go_on.wait(SECONDS)

    with ThreadPoolExecutor(4) as pool:
        painting = pool.submit(stylizer.stylize, photo, on_step=hold)
        begun.wait()
        waiting = [pool.submit(stylizer.stylize, photo, cancel=cancel) for cancel in (None, CancelToken())]
        stylizer.close()  # the painting is in its callback, which close does not wait for
        for each in waiting:
            with pytest.raises(UsageError, match=CLOSED):
                each.result(SECONDS)
        go_on.set()
        with pytest.raises(UsageError, match=CLOSED):
            painting.result(SECONDS)


def test_close_in_threads_while_others_paint_gives_paintings_or_our_error(bundle_path, photo):
    with lsast.load(bundle_path) as alone:
        expected = np.asarray(alone.stylize(photo).image)
    for _ in range(5):
        stylizer, barrier = lsast.load(bundle_path), threading.Barrier(5)

        def work(lane: int, stylizer: Stylizer = stylizer, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if lane == 0:
                stylizer.close()
                return
            while True:
                try:
                    np.testing.assert_array_equal(stylizer.stylize(photo).image, expected)
                except UsageError:
                    return

        with ThreadPoolExecutor(5) as pool:
            list(pool.map(work, range(5)))


def test_close_with_async_calls_queued_ends_them_with_our_error(bundle_path, photo):
    async def scene() -> list[Any]:
        stylizer, begun, loop = lsast.load(bundle_path), asyncio.Event(), asyncio.get_running_loop()

        def on_step(*_: object) -> None:
            loop.call_soon_threadsafe(begun.set)
            # Waits for the loop, which is busy closing the stylizer.
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(SECONDS)

        calls = [asyncio.create_task(stylizer.stylize_async(photo, on_step=on_step)) for _ in range(4)]
        await begun.wait()
        stylizer.close()
        return await asyncio.gather(*calls, stylizer.stylize_async(photo), return_exceptions=True)

    outcomes = asyncio.run(scene())
    assert [type(outcome) for outcome in outcomes] == [UsageError] * 5, outcomes


def test_painting_inside_on_step_of_the_same_thread_raises(stylizer, photo):
    for paint in (stylizer.stylize, lambda *_, **options: asyncio.run(stylizer.stylize_async(photo, **options))):
        for inner in (stylizer.stylize, lambda photo: asyncio.run(stylizer.stylize_async(photo))):
            with pytest.raises(UsageError, match="from inside on_step"):
                paint(photo, on_step=lambda *_, inner=inner: inner(photo))
    stylizer.stylize(photo)


def _photos(photo: np.ndarray, count: int) -> list[np.ndarray]:
    return [photo[: 96 - 8 * index] for index in range(count)]


@pytest.mark.parametrize(
    ("backend", "cache_interval"), [*((backend, 1) for backend in sorted(available_backends())), ("onnxruntime", 2)]
)
def test_on_step_that_waits_for_paintings_of_other_threads_gets_them(
    split_path, photo, backend, cache_interval, monkeypatch
):
    """Each step of each painting waits for a whole one with other inputs, three deep, across two stylizers."""
    monkeypatch.setattr("lsast.sessions.engine_pool.LAPSE_SECONDS", 0.05)
    photos = _photos(photo, 3)
    options: dict[str, Any] = {"steps": 3, "cache_interval": cache_interval}
    with lsast.load(split_path, backend=backend) as one, lsast.load(split_path, backend=backend) as two:
        expected = [np.asarray(one.stylize(each, **options)) for each in photos]

        def paint(depth: int, stylizer: Stylizer) -> None:
            def on_step(*_: object) -> None:
                if depth < 2:
                    _in_thread(lambda: paint(depth + 1, one if depth else two))

            found = stylizer.stylize(photos[depth], on_step=on_step, **options)
            np.testing.assert_array_equal(found, expected[depth])
            painted.append(depth)

        painted: list[int] = []
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda stylizer: paint(0, stylizer), (one, two)))
    assert sorted(painted) == [0] * 2 + [1] * 6 + [2] * 18


def test_on_step_of_async_paintings_that_waits_for_async_paintings_gets_them(stylizer, photo, monkeypatch):
    monkeypatch.setattr("lsast.sessions.engine_pool.LAPSE_SECONDS", 0.05)
    photos = _photos(photo, 3)
    expected = [np.asarray(stylizer.stylize(each, steps=3)) for each in photos]

    async def scene() -> None:
        loop = asyncio.get_running_loop()

        async def paint(depth: int) -> None:
            def on_step(step: int, *_: object) -> None:
                if depth < 2 and step == 1:
                    asyncio.run_coroutine_threadsafe(paint(depth + 1), loop).result(SECONDS)

            found = await stylizer.stylize_async(photos[depth], steps=3, on_step=on_step)
            np.testing.assert_array_equal(found, expected[depth])

        await asyncio.gather(*(paint(0) for _ in range(4)))

    asyncio.run(scene())


EXIT = """
import sys, threading, time, asyncio
import numpy as np, lsast
bundle, backend, what = sys.argv[1:]
photo = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
begun = threading.Event()
def quiet(work):
    def run():
        try:
            work()
        except lsast.LsastError:
            pass
    threading.Thread(target=run, daemon=True).start()
def paint(stylizer):
    while True:
        stylizer.stylize(photo, size=0, on_step=lambda *_: begun.set())
def load():
    while True:
        begun.set()
        with lsast.load(bundle, backend=backend) as stylizer: pass
def callback(stylizer):
    def hold(*_):
        begun.set()
        threading.Event().wait()
    stylizer.stylize(photo, on_step=hold)
if what == "load":
    quiet(load)
else:
    stylizer = lsast.load(bundle, backend=backend)
    for _ in range(3):
        quiet(lambda: {"paint": paint, "callback": callback}[what](stylizer))
begun.wait()
time.sleep(np.random.default_rng().uniform(0, 0.1))
"""


@pytest.mark.parametrize("backend", sorted(available_backends()))
@pytest.mark.parametrize("what", ["paint", "load", "callback"])
def test_exit_while_a_daemon_thread_works_is_clean(python, bundle_path, backend, what):
    done = python(EXIT, bundle_path, backend, what)
    assert (done.returncode, done.stderr) == (0, "")


FORK = """
import os, sys, warnings
import numpy as np, lsast
warnings.simplefilter("ignore")  # of forks beside threads
photo = np.zeros((64, 64, 3), np.uint8)
with lsast.load(sys.argv[1]) as stylizer:
    expected = np.asarray(stylizer.stylize(photo).image)
    me = os.getpid()
    def on_step(step, steps, preview):
        if step == 2 and os.getpid() == me and (child := os.fork()):
            global status
            status = os.waitpid(child, 0)[1]
        elif step == 2:
            assert (np.asarray(stylizer.stylize(photo).image) == expected).all()
    try:
        assert (np.asarray(stylizer.stylize(photo, on_step=on_step).image) == expected).all()
    except lsast.UsageError as error:
        os._exit(7 if os.getpid() != me and "forked inside on_step" in str(error) else 8)
    assert os.waitstatus_to_exitcode(status) == 7, status
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_inside_on_step_paints_and_refuses_to_go_on_with_its_parents_painting(python, bundle_path):
    done = python(FORK, bundle_path)
    assert done.returncode == 0, done.stderr
