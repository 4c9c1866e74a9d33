import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lsast
from lsast_engines.backends.registry import open_engine


def test_lsast_run_with_json_prints_one_object_that_repeats_the_picture(run, bundle_path):
    result = run("in.png", "out.png", "--json", "--strength", "0.5", "--solver", "unipc", "--threads", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report.keys() == {
        *("out", "bundle", "style", "backend", "device", "compute_dtype", "reason", "seconds", "options")
    }
    assert (report["out"], report["bundle"], report["style"]) == ("out.png", "tiny", "vangogh")
    assert list(report["seconds"]) == ["open", "read", "edges", "encode", "denoise", "decode", "finish", "save"]
    options = lsast.Options(**report["options"])
    assert (options.strength, options.solver, options.steps) == (0.5, "unipc", 10)
    with lsast.load(bundle_path, backend=report["backend"]) as stylizer:
        again = stylizer.stylize("in.png", **dataclasses.asdict(options)).image
    np.testing.assert_array_equal(Image.open("out.png"), again)


def test_lsast_run_opens_only_the_graphs_that_its_options_run(run, split_path, monkeypatch):
    opened = []

    def open_noted(path: Path, *arguments: Any) -> Any:
        opened.append(path.stem)
        return open_engine(path, *arguments)

    monkeypatch.setattr("lsast.sessions.engine_pool.open_engine", open_noted)
    first = ["vae_encoder", "controlnet_cond"]
    given = ("--bundle", str(split_path))
    assert run("in.png", "out.png", *given, "--cache-interval", "2").exit_code == 0
    assert opened == [*first, "controlnet", "unet_full", "unet_outer", "vae_decoder"]
    opened.clear()
    assert run("in.png", "out.png", *given, "--preset", "fast", "--cache-interval", "1").exit_code == 0
    assert opened == [*first, "denoiser", "vae_decoder"]


def test_lsast_run_may_paint_over_its_input(run, photo):
    assert run("in.png", "in.png").exit_code == 0
    assert np.asarray(Image.open("in.png")).shape == photo.shape
    assert (np.asarray(Image.open("in.png")) != photo).any()


def test_lsast_run_without_out_paints_beside_the_source(run, folder):
    assert run("in.png").stdout == "in-painted.png\n"
    assert run("in.png", "-o", "again.png", "-s", "vangogh", "-q").stdout == "again.png\n"
    Image.open("in.png").save("in.bmp")
    (folder / "photos").mkdir()
    (folder / "in.png").rename(folder / "photos" / "a.png")
    assert run("in.bmp").stdout == "in-painted.png\n"
    quiet = run("photos", "in.bmp", "-q", "-o", "out")
    assert (quiet.stdout, quiet.stderr) == ("out/in.bmp.png\nout/photos/a.png\n", "")
    (folder / "torn.png").write_bytes(b"torn")
    torn = run("photos", "torn.png", "-q", "-o", "out", "--overwrite")
    assert torn.exit_code == 1
    assert torn.stdout == "out/photos/a.png\n"
    assert torn.stderr.startswith("painted 1, failed 1\n  - torn.png is not a picture")
    assert run("photos").stdout == f"{folder}/photos-painted/a.png\n"


USAGE = {
    "no arguments": ("", "found no IN"),
    "no output of a pattern": ("*.png", "found *.png and no OUT"),
    "unknown option": ("in.png out.png --colour red", "--colour"),
    "no number": ("in.png out.png --steps many", "many"),
    "no threads": ("in.png out.png --threads 0", "threads: found 0; expected a whole number, 1 to 4096"),
    "suffix": ("in.png out.tga", "out.tga"),
    "style": ("in.png out.png --style picasso", "monet, vangogh"),
    "preset": (
        "in.png out.png --preset sdxl",
        "preset: found 'sdxl'; expected exact, balanced, fast, gentle or released",
    ),
    "grid and watch": ("in.png out.png --grid seed=1 --watch", "more than one of --from, --grid"),
    "grid of several": ("in.png in.png out.png --grid seed=1", "--grid and several pictures"),
    "mix": ("in.png out.png --style vangogh+monet:", "    vangogh+monet:\n                  ^"),
    "strength": ("in.png out.png --strength 0.7,0.4@0-2", "--strength"),
    "removed option": ("in.png out.png --control-low 3", "--control-low was removed: use a smaller control_scale"),
    "steps for solver": ("in.png out.png --steps 1000", "999"),
}
FAILURES = {
    "no picture": ("nothing.png out.png", "nothing.png"),
    "not a picture": ("noise.png out.png", "noise.png"),
    "no bundle": ("in.png out.png --bundle no/where", "no/where"),
    "no backend": ("in.png out.png --backend tpu", "tpu"),
    "no device": ("in.png out.png --device toaster", "toaster"),
    "no room": ("in.png in.png/out.png", "in.png/out.png"),
}


@pytest.mark.parametrize("case", [*USAGE, *FAILURES])
def test_lsast_run_that_fails_prints_what_is_wrong_and_exits_1_or_2_of_usage(run, folder, case):
    (folder / "noise.png").write_bytes(b"\x89PNG no more")
    arguments, words = (USAGE | FAILURES)[case]
    result = run(*arguments.split())
    assert (result.exit_code, result.stdout) == (2 if case in USAGE else 1, "")
    assert result.stderr.startswith("Error: ")
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "Usage:" not in result.stderr
    assert not (folder / "out.png").exists()


def test_debug_shows_the_traceback_before_the_same_line(run):
    result = run("nothing.png", "out.png", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_lsast_run_with_a_bug_prints_one_line(run, monkeypatch):
    monkeypatch.setattr("lsast.sampling.sampler.sample", lambda *_: 1 / 0)
    result = run("in.png", "out.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: unexpected ZeroDivisionError: division by zero (--debug shows where)\n"


def test_lsast_run_without_a_backend_says_how_to_install_one(run, monkeypatch):
    for library in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, library, None)
    result = run("in.png", "out.png")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "pip install 'lsast[cpu]'" in result.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_lsast_run_on_a_terminal_shows_progress_and_stops_at_ctrl_c(folder, terminal):
    stderr, read = terminal
    # Large and long enough to be still at work when the first step is seen.
    arguments = ["in.png", "out.png", "--size", "2048", "--steps", "999", "--strength", "1"]
    command = [sys.executable, "-m", "lsast", *arguments]
    # A shell's script starts commands with & deaf to SIGINT, and what they start inherits it.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, preexec_fn=hear)
    seen = b""
    while b"painting" not in seen and (piece := read()):
        seen += piece
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=120)
    while piece := read():
        seen += piece
    assert (process.returncode, stdout) == (130, b"")
    assert b"opening" in seen
    assert b"/999" in seen
    assert seen.endswith(b"Error: interrupted\r\n")
    assert b"Traceback" not in seen
    assert [path.name for path in folder.iterdir()] == ["in.png"]


def test_preset_is_reported_and_works_with_grid_and_from(run, split_path):
    where = ("--bundle", str(split_path))
    painted = run("in.png", "fast.png", "--json", "--preset", "fast", *where)
    assert painted.exit_code == 0, painted.stderr
    options = json.loads(painted.stdout)["options"]
    assert (options["preset"], options["steps"], options["cache_interval"]) == ("fast", 8, 2)
    assert run("--from", "fast.png", "in.png", *where).exit_code == 0
    changed = run("--from", "fast.png", "in.png", "other.png", "--preset", "balanced", "--json", *where)
    assert changed.exit_code == 0, changed.stderr
    assert json.loads(changed.stdout)["options"]["steps"] == 12
    assert run("in.png", "sheet.png", "--grid", "preset=exact,balanced,fast", *where).exit_code == 0
    refused = run("in.png", "out.png", "--preset", "fast")  # the plain bundle has no split graphs
    assert refused.exit_code == 1
    assert "lsast-export bundle" in refused.stderr
