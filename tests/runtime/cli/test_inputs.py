import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import lsast
from lsast.cli.inputs import Job, named, plan_jobs
from lsast.cli.main import main
from lsast_engines.errors import UsageError

QUICK = ("--size", "64", "--guidance", "1")


@pytest.fixture
def folder(folder: Path, photo: np.ndarray) -> Path:
    """A working folder with pictures at two depths."""
    (folder / "in" / "deep").mkdir(parents=True)
    for index, name in enumerate(("in/a.png", "in/b.jpg", "in/deep/a.png", "in/deep/scan.bmp")):
        Image.fromarray(np.roll(photo, 10 * index, axis=1)).save(name)
    (folder / "in" / ".hidden.png").write_bytes(b"no picture")
    (folder / "in" / "notes.txt").write_text("no picture either")
    return folder


def _run(*arguments: str, **settings: Any) -> Result:
    return CliRunner().invoke(main, [*arguments, *QUICK], **settings)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _format(path: str) -> str | None:
    with Image.open(path) as image:
        return image.format


def _pairs(*sources: str, out: str) -> dict[str, str]:
    return {str(job.source): str(job.out) for job in plan_jobs(sources, out).jobs}


def test_plan_jobs_of_one_file_is_single_unless_out_is_a_folder(folder):
    plan = plan_jobs(["in/a.png"], "out.png")
    assert (plan.jobs, plan.single) == ((Job(Path("in/a.png"), Path("out.png")),), True)
    (folder / "there").mkdir()
    assert _pairs("in/a.png", out="there") == {"in/a.png": "there/a.png"}
    assert _pairs("in/a.png", out="new/") == {"in/a.png": "new/a.png"}
    (folder / "in" / "a.png").rename(folder / "a[1].png")  # named like a pattern
    assert _pairs("a[1].png", out="out.png") == {"a[1].png": "out.png"}


def test_plan_jobs_of_several_sources_keeps_folder_names_and_of_a_pattern_those_below_its_plain_part(folder):
    (folder / "more").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "more" / "a.png")
    assert _pairs("in/deep", "more", "in/b.jpg", out="out") == {
        "in/b.jpg": "out/b.jpg",
        "in/deep/a.png": "out/deep/a.png",
        "in/deep/scan.bmp": "out/deep/scan.bmp.png",
        "more/a.png": "out/more/a.png",
    }
    assert _pairs("in/**/*.png", out="out") == {"in/a.png": "out/a.png", "in/deep/a.png": "out/deep/a.png"}
    assert _pairs("in/d*/*.png", out="out") == {"in/deep/a.png": "out/deep/a.png"}


def test_plan_jobs_leaves_out_paintings_inside_the_searched_folder(folder):
    before = _pairs("in", out="in/painted")
    (folder / "in" / "painted").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "in" / "painted" / "a.png")
    assert _pairs("in", out="in/painted") == before
    assert _pairs("in/**/*.png", out="in/painted").keys() == {"in/a.png", "in/deep/a.png"}


WRONG = {
    "nothing found": (["x*.png"], "out", "x*.png"),
    "one file of several": (["in/a.png", "in/b.jpg"], "in/b.jpg", "expected a folder"),
    "a picture's name of several": (["in"], "out.png", "expected a folder"),
    "one output": (["in/a.png", "in/deep/a.png"], "out", "in/a.png: its output, out/a.png, is that of in/deep/a.png"),
    "source as output": (["in/a.png"], "in", "would replace the picture in/a.png"),
    "stream of several": (["in"], "-", "one picture"),
    "stream among several": (["-", "in/a.png"], "out", "one picture"),
    "stream to a folder": (["-"], "in", "name of a file"),
    "video to a stream": (["clip.mp4"], "-", "videos need one"),
}


@pytest.mark.parametrize(("sources", "out", "words"), WRONG.values(), ids=WRONG)
def test_plan_jobs_with_invalid_arguments_raises(folder, sources, out, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        plan_jobs(sources, out)


def test_plan_jobs_with_some_bad_sources_names_them_and_keeps_the_others(folder):
    (folder / "in" / "scan.bmp").write_bytes(b"")
    (folder / "in" / "scan.bmp.png").write_bytes(b"")
    (folder / "empty").mkdir()
    (folder / "same.png").symlink_to("in/a.png")
    plan = plan_jobs(["in/scan.*", "in/a.png", "in/../in/a.png", "empty", "no*", "no.png", "same.png"], ".")
    assert [(str(job.source), str(job.out)) for job in plan.jobs] == [("in/../in/a.png", "a.png")]
    reasons = {name: reason.split(";")[0] for name, reason in plan.failures.items()}
    assert reasons == {
        "empty": "found no picture under empty",
        "no*": "found no file for the pattern no*",
        "no.png": "found no file no.png",
        "in/scan.bmp": "its output, scan.bmp.png, is that of in/scan.bmp.png as well",
        "in/scan.bmp.png": "its output, scan.bmp.png, is that of in/scan.bmp as well",
        "same.png": "its painting would replace the picture same.png",
    }
    lines = {name: named(name, reason) for name, reason in plan.failures.items()}
    assert {name for name, line in lines.items() if line.startswith(f"{name}: ")} == {"in/scan.bmp", "in/scan.bmp.png"}


def test_lsast_run_of_a_folder_paints_each_file_as_alone(folder):
    result = _run("in", "out")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["out/a.png", "out/b.jpg", "out/deep/a.png", "out/deep/scan.bmp.png"]
    assert result.stderr == "left out, by their suffixes no pictures: 1 .txt\npainted 4, failed 0\n"
    assert _files(folder / "out") == ["a.png", "b.jpg", "deep/a.png", "deep/scan.bmp.png"]
    with lsast.load() as stylizer:
        for name in ("a.png", "deep/a.png"):
            alone = stylizer.stylize(folder / "in" / name, size=64, guidance=1.0).image
            np.testing.assert_array_equal(Image.open(folder / "out" / name), alone)


def test_lsast_run_skips_existing_paintings_unless_told_to_overwrite(folder):
    (folder / "out").mkdir()
    (folder / "out" / "a.png").write_bytes(b"an earlier painting")
    result = _run("in/*.*g", "out")
    assert (result.exit_code, result.stdout) == (0, "out/b.jpg\n")
    assert "painted 1, failed 0, skipped 1" in result.stderr
    assert (folder / "out" / "a.png").read_bytes() == b"an earlier painting"
    nothing = _run("in/*.*g", "out", "--bundle", "no/where")  # nothing to paint opens no bundle
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert _run("in/*.*g", "out", "--overwrite").stdout == "out/a.png\nout/b.jpg\n"
    assert _format("out/a.png") == "PNG"


def test_lsast_run_with_a_bad_file_paints_the_others(folder):
    (folder / "in" / "b.jpg").write_bytes((folder / "in" / "b.jpg").read_bytes()[:500])
    result = _run("in", "missing.png", "out")
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 3)
    left_out, early, counts, *failures = result.stderr.splitlines()
    assert left_out.endswith(": 1 .txt")
    assert early == "cannot paint: found no file missing.png; expected a picture, a video or a folder"
    assert counts == "painted 3, failed 2"
    assert [line.split(" cannot")[0] for line in failures] == [
        "  - found no file missing.png; expected a picture, a video or a folder",
        "  - in/b.jpg",
    ]
    assert _files(folder / "out") == ["in/a.png", "in/deep/a.png", "in/deep/scan.bmp.png"]


def test_lsast_run_with_an_option_invalid_for_all_files_tells_it_once(folder):
    (folder / "mask.png").write_bytes(b"no picture")
    for option, status, words in (
        ("--steps=0", 2, "left out.*\npainted 0.*\nError: invalid options:\n  - steps: found 0.*\n"),
        ("--mask=mask.png", 1, "Error: mask.png is not a picture.*\n"),
    ):
        result = _run("in", "out", option)
        assert (result.exit_code, result.stdout) == (status, "")
        assert re.fullmatch(words, result.stderr)
        assert not (folder / "out").exists()


def test_lsast_run_of_names_with_line_breaks_prints_one_line_a_file(folder):
    (folder / "in" / "a.png").rename(folder / "in" / "a\nError: b\x1b.png")
    (folder / "in" / "b.jpg").rename(folder / "in" / "c\nd.jpg")
    (folder / "in" / "c\nd.jpg").write_bytes(b"no picture")
    result = _run("in", "out")
    assert result.stdout.splitlines()[0] == r"out/a\nError: b\x1b.png"
    assert r"  - in/c\nd.jpg is not a picture" in result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_lsast_run_of_several_with_json_prints_one_line_a_file(folder):
    (folder / "out").mkdir()
    (folder / "out" / "a.png").write_bytes(b"there")
    (folder / "in" / "b.jpg").write_bytes(b"no picture")
    result = _run("in", "out", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["status"], line["source"], line["out"]) for line in lines] == [
        ("skipped", "in/a.png", "out/a.png"),
        ("failed", "in/b.jpg", "out/b.jpg"),
        ("painted", "in/deep/a.png", "out/deep/a.png"),
        ("painted", "in/deep/scan.bmp", "out/deep/scan.bmp.png"),
    ]
    assert "in/b.jpg" in lines[1]["error"]
    assert lines[2]["options"]["size"] == 64


def test_lsast_run_with_stdio_writes_the_picture_alone(folder):
    _run("in/a.png", "expected.png")
    expected = Image.open("expected.png")
    for source, given in (("-", Path("in/a.png").read_bytes()), ("in/a.png", b"")):
        result = _run(source, "-", input=given)
        assert (result.exit_code, result.stderr) == (0, "")
        painted = Image.open(io.BytesIO(result.stdout_bytes))
        assert painted.format == "PNG"
        np.testing.assert_array_equal(painted, expected)
    result = _run("-", "out.jpg", input=Path("in/a.png").read_bytes())
    assert (result.stdout, _format("out.jpg")) == ("out.jpg\n", "JPEG")
    assert _run("-", "out.png", input=b"no picture").exit_code == 1
    assert _run("in/a.png", "-", "--json").exit_code == 2


def _process(*arguments: str, **settings: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "lsast", *arguments], **settings)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_lsast_run_after_a_kill_continues(folder, photo):
    for index in range(4):
        Image.fromarray(np.roll(photo, index, axis=0)).save(folder / "in" / f"{index}.png")
    arguments = ("in", "out", "--steps", "100", "--strength", "1", "--size", "64", "--guidance", "1")
    process = _process(*arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)
    done = {name: (folder / "out" / name).stat().st_mtime_ns for name in _files(folder / "out") if name[0] != "."}
    assert 0 < len(done) < 8
    time.sleep(0.01)
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0
    assert f"painted {8 - len(done)}, failed 0, skipped {len(done)}" in again.stderr
    for name, changed in done.items():
        assert (folder / "out" / name).stat().st_mtime_ns == changed
        Image.open(folder / "out" / name).load()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_lsast_run_of_several_on_a_terminal_shows_two_bars(folder, terminal):
    stderr, read = terminal
    process = _process("in", "out", *QUICK, stdout=subprocess.PIPE, stderr=stderr)
    seen = b"".join(iter(read, b""))
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(stdout.splitlines()) == 4
    assert all(words in seen for words in (b"files: 100%", b"4/4", b"painting:"))
    assert seen.endswith(b"painted 4, failed 0\r\n")
