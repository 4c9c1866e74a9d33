"""The examples run, and give what the library gives."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lsast

EXAMPLES = Path(__file__).parents[2] / "examples"
ROOMS = [str(EXAMPLES.parent / room) for room in ("engines", "runtime")]


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path) -> None:
    monkeypatch.setenv("LSAST_BUNDLE", str(bundle_path))
    monkeypatch.chdir(tmp_path)


def test_examples_all_have_a_test() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].glob("**/test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in text or f"{path.stem}.py" in text, f"no test names {path.name}"


def test_paint_example_paints_each_picture_in_each_style(
    photo: np.ndarray, stylizer: lsast.Stylizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, rgb in (("a", photo), ("b", photo[:, ::-1])):
        Image.fromarray(rgb).save(tmp_path / f"{name}.png")
    example = _example("paint")
    load = lsast.load
    monkeypatch.setattr(lsast, "load", lambda: _Quick(load()))
    example.main(tmp_path / "out", [tmp_path / "a.png", tmp_path / "b.png"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{name}-{index}.png" for name in "ab" for index in range(3)
    ]
    for name, index in (("a", 1), ("b", 2)):
        alone = stylizer.stylize(tmp_path / f"{name}.png", example.STYLES[index], seed=7, **QUICK)
        with Image.open(tmp_path / "out" / f"{name}-{index}.png") as image:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(alone.image)).max() <= 2


QUICK: dict[str, Any] = {"steps": 2, "strength": 1.0, "size": 64, "guidance": 1.0}


class _Quick:
    """A stylizer that takes two steps at 64 x 64 whatever it is asked."""

    def __init__(self, stylizer: lsast.Stylizer) -> None:
        self._stylizer = stylizer

    def __enter__(self) -> _Quick:
        return self

    def __exit__(self, *_: object) -> None:
        self._stylizer.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stylizer, name)
        return (lambda *args, **options: method(*args, **{**options, **QUICK})) if "stylize" in name else method


def test_paint_example_reports_errors() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "paint.py"), "out", "nothing.png"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(ROOMS)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, "found no file nothing.png; expected a picture\n")


def _news(painter: Any) -> list[tuple[str, Any]]:
    found = []
    while not painter.news.empty():
        found.append(painter.news.get())
    return found


@pytest.fixture
def window() -> ModuleType:
    pytest.importorskip("tkinter", reason="this Python has no Tk")
    return _example("window")


def test_window_example_painter_reports_previews_and_the_end(
    window: ModuleType, photo: np.ndarray, stylizer: lsast.Stylizer
) -> None:
    painter = window.Painter(stylizer)
    painter.start(photo, **QUICK).join()
    news = _news(painter)
    assert [kind for kind, _ in news] == ["preview", "preview", "preview", "done"]
    assert [share for kind, (share, _) in news[:3]] == [0, 0.5, 1]
    np.testing.assert_array_equal(news[-1][1].image, stylizer.stylize(photo, **QUICK).image)
    painter.start(photo, style="picasso").join()
    ((kind, message),) = _news(painter)
    assert (kind, "picasso" in message) == ("failed", True)


def test_window_example_painter_stops_for_the_next(
    window: ModuleType, photo: np.ndarray, stylizer: lsast.Stylizer
) -> None:
    painter = window.Painter(stylizer)
    first = painter.start(photo, steps=500, strength=1.0, size=64)
    second = painter.start(photo, **QUICK)
    first.join()
    second.join()
    kinds = [kind for kind, _ in _news(painter)]
    assert kinds.count("stopped") == 1
    assert kinds[-1] == "done" or kinds[-2:] == ["done", "stopped"]


def test_window_example_shows_the_painting(window: ModuleType, photo: np.ndarray, stylizer: lsast.Stylizer) -> None:
    import tkinter

    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        pytest.skip(f"no display to open a window on ({error}); xvfb-run pytest has one")
    try:
        opened = window.Window(root, _Quick(stylizer))
        opened.paint(photo)
        end = time.monotonic() + 60
        while opened.says.get() != "Done." and time.monotonic() < end:
            root.update()
            time.sleep(0.01)
        root.update()
        assert opened.says.get() == "Done."
        assert opened.progress["value"] == 1.0
        assert (opened._photo.width(), opened._photo.height()) == (640, 384)
        shown = Image.new("RGB", (640, 384))
        shown.putdata([opened._photo._PhotoImage__photo.get(x, y) for y in range(384) for x in range(640)])
        expected = stylizer.stylize(photo, style=stylizer.styles[0], **QUICK).image.resize((640, 384))
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(expected)).max() <= 1
    finally:
        root.destroy()


def test_frames_example_writes_pictures(
    photo: np.ndarray, stylizer: lsast.Stylizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2

    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 10, photo.shape[1::-1])
    for shift in range(5):
        writer.write(np.ascontiguousarray(np.roll(photo, shift, axis=1)[..., ::-1]))
    writer.release()
    if not clip.stat().st_size:
        pytest.skip("this OpenCV writes no MJPG")
    example = _example("frames")
    read = list(example.frames(clip, every=2))
    assert len(read) == 3
    assert np.abs(read[1].astype(int) - np.roll(photo, 2, axis=1)).mean() < 8  # JPEG, half the chroma
    load = lsast.load
    monkeypatch.setattr(lsast, "load", lambda: _Quick(load()))
    assert example.main(clip, tmp_path / "out", 2, {"style": "monet"}) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{n:05d}.png" for n in range(3)]
    with Image.open(tmp_path / "out" / "00000.png") as image:
        np.testing.assert_array_equal(image, stylizer.stylize(read[0], "monet", **QUICK).image)
