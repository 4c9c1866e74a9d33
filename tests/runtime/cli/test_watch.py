import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from lsast.cli.inputs import Job
from lsast.cli.watch import check_watch, watch
from lsast_engines.errors import UsageError

PATIENCE = 20.0
SETTLED = 0.3
"""Seconds for which a file must not have changed, in these tests."""
QUIET = 2.5 * SETTLED
"""Seconds after which nothing more is expected."""


@pytest.fixture(autouse=True)
def _settled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsast.cli.watch.SETTLED", SETTLED)


class Watched:
    """Jobs as a thread of its own gets them, each with a painting that appears at once."""

    def __init__(self, sources: list[str], out: str, **settings: bool) -> None:
        self._stop = threading.Event()
        self.jobs: list[tuple[str, str]] = []
        self._thread = threading.Thread(target=self._run, args=(watch(sources, out, stop=self._stop, **settings),))
        self._thread.start()

    def _run(self, jobs: Iterator[Job]) -> None:
        for job in jobs:
            assert job.out is not None
            job.out.parent.mkdir(parents=True, exist_ok=True)
            job.out.write_bytes(b"painting")
            self.jobs.append((str(job.source), str(job.out)))

    def wait(self, count: int, rest: float = 0.0) -> list[tuple[str, str]]:
        """Wait for so many jobs, then for `rest` seconds, in which no more are expected."""
        patience = time.monotonic() + PATIENCE
        while len(self.jobs) < count and time.monotonic() < patience:
            time.sleep(0.02)
        time.sleep(rest)
        return self.jobs

    def close(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def _old(path: Path, seconds: float = 60) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("done", "stale", "new"):
        (tmp_path / "in" / f"{name}.png").write_bytes(b"picture")
        _old(tmp_path / "in" / f"{name}.png")
    (tmp_path / "out").mkdir()
    for name in ("done", "stale"):
        (tmp_path / "out" / f"{name}.png").write_bytes(b"earlier")
    _old(tmp_path / "out" / "stale.png", 120)
    return tmp_path


def test_watch_yields_missing_and_older_paintings_then_changes_when_they_are_complete(folder):
    with contextlib.closing(Watched(["in"], "out")) as watched:
        assert watched.wait(2, QUIET) == [("in/new.png", "out/new.png"), ("in/stale.png", "out/stale.png")]
        with (folder / "in" / "slow.png").open("wb") as handle:
            for _ in range(12):
                handle.write(b"a piece")
                handle.flush()
                time.sleep(SETTLED / 6)
                assert len(watched.jobs) == 2
        assert watched.wait(3)[2:] == [("in/slow.png", "out/slow.png")]
        (folder / "in" / "deep").mkdir()
        (folder / "in" / "deep" / "late.jpg").write_bytes(b"picture")
        (folder / "in" / "notes.txt").write_text("no picture")
        (folder / "in" / "done.png").write_bytes(b"another picture")
        expected = [("in/deep/late.jpg", "out/deep/late.jpg"), ("in/done.png", "out/done.png")]
        assert sorted(watched.wait(5, QUIET)[3:]) == expected


def test_watch_with_overwrite_yields_everything_once(folder):
    (folder / "more").mkdir()
    with contextlib.closing(Watched(["in", "more"], "out", overwrite=True)) as watched:
        expected = ["out/in/done.png", "out/in/new.png", "out/in/stale.png"]
        assert [out for _, out in watched.wait(3, QUIET)] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are no text")
def test_watch_of_pipes_and_names_that_clash_or_are_no_text_tells_each_once_and_goes_on(folder, caplog):
    os.mkfifo("in/pipe.png")
    with contextlib.closing(Watched(["in"], "out")) as watched:
        watched.wait(2)
        for name in ("c.bmp", "c.bmp.png", os.fsdecode(b"caf\xe9.png")):
            (folder / "in" / name).write_bytes(b"picture")
        assert watched.wait(3)[2:] == [("in/caf\udce9.png", "out/caf\udce9.png")]
        (folder / "in" / "last.png").write_bytes(b"picture")
        assert watched.wait(4, QUIET)[3:] == [("in/last.png", "out/last.png")]
    assert sum("is that of in/c.bmp" in message for message in caplog.messages) == 2
    assert caplog.text.count("pipe.png is left out") == 1


def test_check_watch_accepts_folders_only(folder):
    for sources, out in ((["in/done.png"], "out"), (["-"], "out"), (["in", "x*"], "out"), (["in"], "in/done.png")):
        with pytest.raises(UsageError, match="expected"):
            check_watch(sources, out)
    check_watch(["in"], "new")


def test_lsast_run_with_watch_paints_until_interrupted(folder, photo, bundle_path):
    for path in (folder / "in").iterdir():
        path.unlink()
    environment = {**os.environ, "LSAST_BUNDLE": str(bundle_path)}
    command = [sys.executable, "-m", "lsast", "in", "fresh", "--watch", "--size", "64", "--guidance", "1"]
    process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        assert process.stdout is not None
        assert process.stderr.readline() == b"watching in; Ctrl-C ends\n"
        (folder / "in" / "bad.png").write_bytes(b"no picture")
        Image.fromarray(photo).save(folder / "in" / "good.png")
        assert process.stdout.readline() == b"fresh/good.png\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1  # bad.png
    assert stderr.startswith(b"painted 1, failed 1\n  - in/bad.png is not a picture")
