import errno
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lsast.cli.main import main as lsast_run
from lsast_engines.errors import UsageError
from lsast_eval import EvalOptions
from lsast_eval.cli import main
from lsast_eval.voting.votes import Vote, append_vote

from .conftest import WORKS, save, scene


def _run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


PAGE = Path(__file__).parents[2] / "docs" / "guides" / "evaluation.md"


def test_commands_of_the_page_run_on_a_tree_like_div2k(capsys, studio, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        save(tmp_path / "DIV2K_valid_HR", f"{801 + seed:04}", scene(seed))
    Path("photos").symlink_to(studio / "photos")
    for name, kind in (("claude-monet", "stripes"), ("hokusai", "blots")):
        Path("artists").mkdir(exist_ok=True)
        Path("artists", name).symlink_to(studio / "artists" / kind)
    (block, *_) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    paint, judge = (shlex.split(line)[1:] for line in block.splitlines())
    with pytest.raises(SystemExit) as ended:
        lsast_run([*paint, "--size", "64", "--steps", "2", "--strength", "1", "--backend", "onnxruntime"])
    assert not ended.value.code
    capsys.readouterr()
    status, out, err = _run(capsys, *judge, "--size", "64", "--bootstrap", "20", "--cache", cache, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert (report["artist"], report["works"], report["methods"]["ours"]["n"]) == ("claude-monet", WORKS, 3)
    assert list(report["references"]) == ["(contents)", "(works)"]
    assert report["judges"].keys() == {"deception", "deception_lite2"}
    assert report["judges"]["deception"]["classes"] == {"claude-monet": WORKS, "hokusai": WORKS, "photos": WORKS}
    lines = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)))
    assert sorted(lines) == sorted(report["metrics"])
    with Image.open("sheet.png") as sheet:
        assert sheet.format == "PNG"


JUDGED = ("--contents", "x", "--works", "x", "--method", "a=x")
WRONG = {
    "a sheet that is a folder": ((*JUDGED, "--sheet", "."), "found --sheet ., a folder or a device"),
    "a sheet below a file": ((*JUDGED, "--sheet", f"{__file__}/a.png"), "expected a folder that can be made"),
    "nothing": ((), "found no --contents DIR and no --works DIR and no --method NAME=DIR"),
    "a method without a folder": (("--method", "ours"), "found 'ours'; expected NAME=DIR"),
    "a method twice": (("--method", "a=x", "--method", "a=y"), "found 'a' twice"),
    "an unknown option": (("--styel", "x"), "No such option"),
    "votes without a file": (("votes",), "Missing argument"),
    "votes of no file": (("votes", "no.jsonl"), "found no file no.jsonl"),
    "a vote on nothing": (("vote", "--out", "v.jsonl"), "found no --contents DIR"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_cli_with_wrong_usage_exits_2(capsys, arguments, message):
    status, out, err = _run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("Error: ")
    assert len(err.splitlines()) == 1


def test_cli_prints_scores_before_a_sheet_that_fails(capsys, monkeypatch):
    def sheet(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    report = SimpleNamespace(to_json=dict, table=lambda: "scores", sheet=sheet)
    monkeypatch.setattr("lsast_eval.evaluation.evaluate", lambda *_, **__: report)
    assert _run(capsys, *JUDGED, "--sheet", "a.png") == (1, "scores\n", "Error: Input/output error\n")


def test_votes_command_escapes_its_warnings_and_quiet_hides_them(capsys, tmp_path):
    append_vote(path := tmp_path / "\x1b[2J", Vote("monet", "c", "ours", "theirs", "tie", "me", 1.0, "t"))
    path.write_bytes(path.read_bytes() + b'{"form')
    told = f"{tmp_path}/\\x1b[2J, line 2: left out, it is not finished\n"
    assert [_run(capsys, "votes", path, *more)[2] for more in ([], ["-q"])] == [told, ""]


def test_votes_command_prints_text_and_json(capsys, tmp_path):
    for voter, choice in (("me", "left"), ("you", "left"), ("me", "tie"), ("you", "right")):
        vote = Vote("monet", "c", "ours", "theirs", choice, voter, 1.0, "2026-01-01T00:00:00+00:00")
        append_vote(tmp_path / "votes.jsonl", vote)
    status, out, _ = _run(capsys, "votes", tmp_path / "votes.jsonl", "--json")
    assert status == 0
    report = json.loads(out)
    assert (report["votes"], report["voters"]) == (4, 2)
    assert report["artists"]["monet"][0]["rate"] == 0.625
    assert report["left"]["rate"] == pytest.approx(2 / 3)
    status, out, _ = _run(capsys, "votes", tmp_path / "votes.jsonl")
    assert "ours against theirs" in out
    assert "62.5%" in out
    assert "2 won, 1 tied, 1 lost" in out


def test_cli_without_the_extra_names_it(capsys, studio, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    contents = studio / "contents"
    status, _, err = _run(capsys, "--contents", contents, "--works", contents, "--method", f"a={contents}")
    assert status == 1
    assert "pip install 'lsast[eval]'" in err


def test_eval_options_list_all_faults():
    bootstrap = "bootstrap: found 1; expected a whole number, 20 or more"
    with pytest.raises(UsageError, match=f"(?s)size: found 8;.*{bootstrap}.*seed: found -1"):
        EvalOptions(size=8, bootstrap=1, seed=-1)
