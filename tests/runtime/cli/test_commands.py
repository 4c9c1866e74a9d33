"""`lsast`: the commands under one name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import lsast
from lsast.cli.commands import main
from lsast.cli.main import main as run

COMMANDS = ["run", "serve", "train", "export", "eval", "styles", "cache", "doctor"]


@pytest.fixture
def invoke(
    tmp_path: Path, photo: np.ndarray, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs `lsast` in a folder with in.png, with the tiny bundle as the default."""
    Image.fromarray(photo).save(tmp_path / "in.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSAST_BUNDLE", str(bundle_path))
    return lambda *arguments, **more: CliRunner().invoke(main, arguments, prog_name="lsast", **more)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_version_quiet_verbose_and_examples(command: str) -> None:
    if command in ("train", "export", "eval"):
        pytest.importorskip(f"lsast_{command}")
    assert CliRunner().invoke(main, [command, "--version"]).stdout == f"lsast {lsast.__version__}\n"
    text = CliRunner().invoke(main, [command, "--help"], terminal_width=110).stdout
    assert {"-v, --verbose", "-q, --quiet", "--debug"} <= {line[2:].partition("  ")[0] for line in text.splitlines()}
    assert text.count(f"\n    lsast {command}") + text.count(f"lsast-{command} ") >= 2


def test_help_lists_the_commands_and_none_is_like_help(invoke: Callable[..., Result]) -> None:
    text = invoke("--help").stdout
    listed = [line.split()[0] for line in text.partition("Commands:\n")[2].splitlines()]
    assert sorted(listed) == sorted(COMMANDS)
    assert (invoke().exit_code, invoke().stderr) == (2, text)


def test_wrong_command_says_which_is_meant(invoke: Callable[..., Result]) -> None:
    result = invoke("stlyes")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: found command 'stlyes'; expected run, ")
    assert result.stderr.endswith("; did you mean styles?\n")


def test_run_is_lsast_run(invoke: Callable[..., Result]) -> None:
    assert invoke("-q", "run", "in.png", "a.png", "--seed", "3", "--size", "64").stdout == "a.png\n"
    assert CliRunner().invoke(run, ["in.png", "b.png", "--seed", "3", "--size", "64"]).stdout == "b.png\n"
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_styles_are_listed_and_painted_on_a_sheet(invoke: Callable[..., Result]) -> None:
    assert invoke("styles").stdout == "monet\nvangogh\n"
    assert json.loads(invoke("styles", "--json").stdout) == {"styles": ["monet", "vangogh"], "guidance_baked": {}}
    assert invoke("styles", "in.png").exit_code == 2
    result = invoke("styles", "in.png", "-o", "sheet.png", "--json")
    facts = json.loads(result.stdout)
    assert (facts["out"], facts["axes"], facts["options"]["size"]) == (
        "sheet.png",
        {"style": ["monet", "vangogh"]},
        256,
    )
    with lsast.load() as stylizer, Image.open("sheet.png") as image:
        sheet = lsast.contact_sheet(stylizer, "in.png", facts["axes"], size=256, steps=10, solver="unipc", seed=0)
        np.testing.assert_array_equal(image, sheet.image)
    assert invoke("styles", "-o", "lighthouse.jpg").stdout == "lighthouse.jpg\n"


def test_shell_completion_knows_commands_styles_and_choices(invoke: Callable[..., Result]) -> None:
    def completed(*words: str) -> list[str]:
        environment = {"COMP_WORDS": " ".join(("lsast", *words)), "COMP_CWORD": str(len(words))}
        result = invoke(env={"_LSAST_COMPLETE": "bash_complete", **environment})
        return [line.partition(",")[2] for line in result.stdout.splitlines()]

    assert completed("r") == ["run"]
    assert completed("run", "-s", "monet+v") == ["monet+vangogh"]
    assert completed("run", "--solver", "dd") == ["ddim", "ddim_lsast"]
    assert completed("cache", "p") == ["prune"]


def test_command_of_a_missing_extra_says_how_to_install_it(tmp_path: Path) -> None:
    calls = {"train": ["--style", "a", "--images", str(tmp_path)], "export": ["--style", "a"], "serve": []}
    for command, arguments in calls.items():
        code = (
            "import sys\nsys.modules.update(dict.fromkeys(['torch', 'diffusers', 'fastapi', 'uvicorn']))\n"
            f"from lsast.cli.commands import main\nmain({[command, *arguments]!r})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(filter(None, sys.path)), "HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        extra = {"serve": "server"}.get(command, command)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert done.stderr.count("\n") == 1
        assert f"pip install 'lsast[{extra}]'" in done.stderr
