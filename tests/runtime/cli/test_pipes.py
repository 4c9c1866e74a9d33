"""Pipes in the place of files: read once where that is enough, else refused; named, not waited for, in folders."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsast_engines import picture_file
from lsast_engines.errors import PictureError
from lsast_engines.images import read_picture

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")


@pytest.fixture
def folder(folder: Path, photo: np.ndarray) -> Path:
    """A working folder with pictures, a mask, and pipes that nobody writes to."""
    (folder / "photos").mkdir()
    for name in ("photos/a.png", "photos/b.png"):
        Image.fromarray(photo).save(name)
    Image.fromarray(np.eye(*photo.shape[:2], dtype=bool)).save("mask.png")
    for name in ("pipe", "pipe.gif", "pipe.mp4", "photos/pipe.png"):
        os.mkfifo(name)
    return folder


def _feed(name: str) -> None:
    threading.Thread(target=lambda: Path("pipe").write_bytes(Path(name).read_bytes()), daemon=True).start()


def test_lsast_run_of_a_pipe_paints_what_comes_out_of_it(run):
    assert run("in.png", "expected.png").exit_code == 0
    _feed("in.png")
    assert run("pipe", "out.png").exit_code == 0
    assert Path("out.png").read_bytes() == Path("expected.png").read_bytes()
    _feed("in.png")
    assert run("pipe", "sheet.png", "--grid", "strength=0.4,0.6").exit_code == 0


def test_lsast_run_reads_a_mask_from_a_pipe_once_for_all_pictures(run):
    assert run("in.png", "expected.png", "-m", "mask.png").exit_code == 0
    _feed("mask.png")
    assert run("photos/a.png", "photos/b.png", "painted/", "-m", "pipe").exit_code == 0
    for name in ("a", "b"):
        assert Path(f"painted/{name}.png").read_bytes() == Path("expected.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pipe.mp4", "out.mp4"], "a video is read more than once"),
        (["pipe.gif"], "found pipe.gif and no OUT"),
        (["--from", "pipe"], "it is read more than once"),
        (["--from", "in.png", "pipe"], "it is read more than once"),
    ],
)
def test_lsast_run_refuses_a_pipe_where_one_reading_is_not_enough(run, arguments, words):
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert words in result.stderr


@pytest.mark.parametrize("source", ["photos", "photos/*.png"])
def test_lsast_run_names_the_pipes_of_a_folder_and_paints_the_others(run, source):
    result = run(source, "painted/")
    assert (result.exit_code, result.stderr.count("pipe.png is left out: it is no file")) == (0, 1)
    assert sorted(os.listdir("painted")) == ["a.png", "b.png"]


def test_read_picture_of_an_endless_stream_stops_at_a_bound(monkeypatch):
    monkeypatch.setattr(picture_file, "MAX_BYTES", 5_000_000)
    with (
        open("/dev/zero", "rb") as endless,
        pytest.raises(PictureError, match="found more than 5 MB in the file object"),
    ):
        read_picture(endless)
