"""`lsast`: the commands under one name."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import lsast
from lsast.cli.commands import main
from lsast_engines.backends import fp32_weights

COMMANDS = ["run", "serve", "train", "export", "eval", "styles", "cache", "doctor"]


@pytest.fixture
def invoke(folder: Path) -> Callable[..., Result]:
    """Runs `lsast` in a folder with in.png, with the tiny bundle as the default."""
    return lambda *arguments, **more: CliRunner().invoke(main, arguments, prog_name="lsast", **more)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_version_quiet_verbose_and_examples(command):
    if command in ("train", "export", "eval"):
        pytest.importorskip(f"lsast_{command}")
    assert CliRunner().invoke(main, [command, "--version"]).stdout == f"lsast {lsast.__version__}\n"
    text = CliRunner().invoke(main, [command, "--help"], terminal_width=110).stdout
    assert {"-v, --verbose", "-q, --quiet", "--debug"} <= {line[2:].partition("  ")[0] for line in text.splitlines()}
    assert text.count(f"\n    lsast {command}") + text.count(f"lsast-{command} ") >= 2


def test_help_lists_the_commands_and_none_is_like_help(invoke):
    text = invoke("--help").stdout
    listed = [line.split()[0] for line in text.partition("Commands:\n")[2].splitlines()]
    assert sorted(listed) == sorted(COMMANDS)
    assert (invoke().exit_code, invoke().stderr) == (2, text)


def test_wrong_command_says_which_is_meant(invoke):
    result = invoke("stlyes")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: found command 'stlyes'; expected run, ")
    assert result.stderr.endswith("; did you mean styles?\n")
    assert invoke("paint", "in.png").stderr.endswith("; did you mean run?\n")


def test_run_is_lsast_run(invoke, run):
    assert invoke("-q", "run", "in.png", "a.png", "--seed", "3", "--size", "64").stdout == "a.png\n"
    assert run("in.png", "b.png", "--seed", "3", "--size", "64").stdout == "b.png\n"
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_styles_are_listed_and_painted_on_a_sheet(invoke):
    assert invoke("styles").stdout == "monet\nvangogh\n"
    assert json.loads(invoke("styles", "--json").stdout) == {"styles": ["monet", "vangogh"], "guidance_baked": {}}
    assert invoke("styles", "in.png").exit_code == 2
    result = invoke("styles", "in.png", "-o", "sheet.png", "--json")
    facts = json.loads(result.stdout)
    assert (facts["out"], facts["axes"]) == ("sheet.png", {"style": ["monet", "vangogh"]})
    assert facts["options"]["size"] == 256
    with lsast.load() as stylizer, Image.open("sheet.png") as image:
        sheet = lsast.contact_sheet(stylizer, "in.png", facts["axes"], size=256, steps=10, solver="unipc", seed=0)
        np.testing.assert_array_equal(image, sheet.image)
    assert invoke("styles", "-o", "lighthouse.jpg").stdout == "lighthouse.jpg\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_knows_commands_styles_and_names(invoke, shell, monkeypatch, bundle_path):
    monkeypatch.setenv("LSAST_HOME", "home")
    Path("home/engines").mkdir(parents=True)
    Path("home/engines/mine").symlink_to(bundle_path)

    def completed(*words: str) -> list[str]:
        # As the scripts that `_LSAST_COMPLETE=SHELL_source lsast` prints ask: fish tells the begun word by itself.
        asked = {"COMP_WORDS": " ".join(("lsast", *words)), "COMP_CWORD": str(len(words))}
        asked = {"COMP_WORDS": asked["COMP_WORDS"], "COMP_CWORD": words[-1]} if shell == "fish" else asked
        lines = invoke(env={"_LSAST_COMPLETE": f"{shell}_complete", **asked}).stdout.splitlines()
        if shell == "zsh":  # kind, word and help, a line each
            return lines[1::3]
        return [line.partition(",")[2].partition("\t")[0] for line in lines]

    assert completed("r") == ["run"]
    assert completed("run", "-s", "monet+v") == ["monet+vangogh"]
    assert completed("run", "--solver", "dd") == ["ddim", "ddim_lsast"]
    assert completed("cache", "p") == ["prune"]
    for command in ("run", "serve", "export check"):
        assert completed(*command.split(), "--backend", "open") == ["openvino"]
    assert completed("run", "--compute-dtype", "f") == ["fp16", "fp32"]
    assert completed("serve", "--device", "c") == ["cpu", "cuda"]
    for words in ("run --bundle", "styles --bundle", "export check", "train --base"):
        assert completed(*words.split(), "mi")[:2] == ["mine", "mini"]  # and folders
    for command in COMMANDS:
        if command not in ("train", "export", "eval") or importlib.util.find_spec(f"lsast_{command}"):
            assert "--version" in completed(command, "--ver")


def test_cache_lists_prunes_and_clears(run, folder, bundle_path, monkeypatch):
    def cached(action: str) -> list[tuple[str, str, bool]]:
        result = run("--cache", action, "--json")
        assert result.exit_code == 0, result.stderr
        return [(entry["kind"], entry["source"], entry["used"]) for entry in json.loads(result.stdout)["entries"]]

    monkeypatch.setenv("LSAST_HOME", str(folder / "home"))
    monkeypatch.setattr(fp32_weights, "MIN_BYTES", 1)
    assert cached("list") == []
    for name in ("here", "gone"):
        shutil.copytree(bundle_path, name)
        assert run("in.png", "out.png", "--bundle", name, "--size", "64", "--backend", "onnxruntime").exit_code == 0
    shutil.copytree(bundle_path, "home/engines/mine")
    shutil.copytree("home/compiled/onnxruntime", "home/compiled/mini-0123/rtx")
    shutil.rmtree("gone")

    kind, here, gone = "graphs of onnxruntime", str(folder / "here"), str(folder / "gone")
    engines = ("compiled engines", "mini-0123", True)
    assert set(cached("list")) == {(kind, here, True), (kind, gone, False), engines}
    assert f"{gone} (gone or changed" in run("--cache", "list").stdout
    assert set(cached("prune")) == {(kind, here, True), engines}
    assert cached("clear") == []
    assert Path("home/engines/mine/manifest.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        *("train --style a --images .", "train --no-such-option", "train distill --no-such-option"),
        *("export --style a", "export --no-such-option", "export check nothing superfluous"),
        *("eval --works .", "serve"),
    ],
)
def test_command_of_a_missing_extra_says_first_how_to_install_it(python, arguments):
    code = (
        "import sys\nsys.modules.update(dict.fromkeys(['torch', 'diffusers', 'fastapi', 'uvicorn']))\n"
        f"from lsast.cli.commands import main\nmain({arguments.split()!r})"
    )
    done = python(code)
    extra = arguments.split()[0].replace("serve", "server")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("\n") == 1
    assert f"pip install 'lsast[{extra}]'" in done.stderr
