"""The pages: every link leads somewhere, the README is short, and its commands run word for word."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lsast_engines.bundle.bundle import EMBEDDED

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    if not path.is_relative_to(ROOT / ".venv")
)
README = ROOT / "README.md"
PACKAGES = ("engines", "eval", "export", "runtime", "train")


def _prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)) if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_links_lead_to_files_and_headings_that_exist(page):
    broken = []
    for link in _links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def test_index_names_every_page():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in _links(index)}
    assert {path for path in PAGES if path.is_relative_to(ROOT / "docs") and path != index} <= linked


def test_architecture_page_names_every_folder_and_only_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("__init__.py")}
    listed, above = set(), [ROOT]
    for indent, name in re.findall(r"^( *)([\w/]+)/  +\S", text, re.MULTILINE):
        above[len(indent) // 4 + 1 :] = [above[len(indent) // 4] / name]
        listed.add(above[-1])
    assert listed == found | {ROOT / "engines" / "lsast_engines" / "mini"}
    named = re.findall(r"`([a-z]+/[\w/]+(?:\.py|/))`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_has_at_most_120_lines_and_one_table():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert len(re.findall(r"^\|[-|]+\|$", text, re.MULTILINE)) == 1


def _readme_commands() -> list[str]:
    """The lines of the README's shell blocks, without those that make or fill a virtual environment."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if not line.startswith(("python3 -m venv", "pip install"))]


QUICK_TRAINING = (
    "from dataclasses import replace; from lsast_train.options import PRESETS; "
    "PRESETS['quick'] = replace(PRESETS['quick'], size=64, views=1, evaluate_latents=2);"
)


def test_readme_commands_run_word_for_word_on_a_clean_clone(tmp_path):
    """With the packages that are installed here; that they install is what `.ci/run` shows.

    To be quick, the sizes that are the default are 64: `test_readme_python_example_runs` paints at 512.
    """
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "mini"))
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["defaults"]["size"] = 64
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    clone = tmp_path / "clone"
    images = clone / "docs" / "images"
    images.mkdir(parents=True)
    for name in ("lighthouse.jpg", "steering.jpg"):  # learning needs two pictures
        shutil.copyfile(ROOT / "docs" / "images" / name, images / name)
    commands = tmp_path / "bin"
    commands.mkdir()
    scripts = {name: place for name, place in MODULES.items() if " " not in name}
    for name, (module, function) in (scripts | {"lsast-train": ("lsast_train.__main__", "main")}).items():
        quick = QUICK_TRAINING if name == "lsast-train" else ""
        code = f"import sys; {quick} from {module} import {function}; sys.argv[0] = '{name}'; sys.exit({function}())"
        # A server would not end; what it does, tests/runtime/server shows.
        end = "--help" if name == "lsast-serve" else ""
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@" {end}\n', encoding="utf-8")
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / package) for package in PACKAGES),
        "LSAST_HOME": str(tmp_path / "home"),
        "LSAST_BUNDLE": str(bundle),
    }
    script = "\n".join(["set -e", *_readme_commands()])
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("painted.png", "monet.png", "mix.png", "mine.png", "painted/lighthouse.jpg"):
        assert (clone / name).is_file(), name


def test_readme_python_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "painted.png").is_file()


def _documented_calls() -> list[tuple[str, list[str]]]:
    """Every `lsast-…` call in the shell blocks of the pages, as (page, words)."""
    calls = []
    for page in PAGES:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for block in (text for language, text in blocks if language in ("", "sh")):
            for line in block.replace("\\\n", " ").splitlines():
                words = re.sub(r"^(\$ )?(\w+=\S+ )*|\s#\s.*", "", line.strip()).split()
                if words and words[0] in MODULES:
                    calls.append((str(page.relative_to(ROOT)), words))
    return calls


MODULES = {
    "lsast": ("lsast.cli.commands", "main"),
    "lsast-run": ("lsast.cli.main", "main"),
    "lsast-serve": ("lsast.server.cli", "main"),
    "lsast-train": ("lsast_train.cli.main", "command"),
    "lsast-export": ("lsast_export.cli.main", "main"),
    "lsast-eval": ("lsast_eval.cli", "main"),
}
"""Where the click command of a call is."""


def _command(words: list[str]) -> click.Command:
    """The command that `words` call, the sub-command of a group if they name one."""
    module, name = MODULES.get(" ".join(words[:2]), MODULES[words[0]])
    command: click.Command = getattr(importlib.import_module(module), name)
    for word in words[1:]:
        if not isinstance(command, click.Group):
            break
        command = command.get_command(click.Context(command), word) or command
    return command


def test_documented_calls_use_options_that_the_commands_show():
    wrong = []
    for page, words in _documented_calls():
        options = [each for each in _command(words).params if not getattr(each, "hidden", False)]
        shown = {name for option in options for name in (*option.opts, *option.secondary_opts)}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        if unknown := used - shown:
            wrong.append(f"{page}: {' '.join(words[:3])} … {', '.join(sorted(unknown))}")
    assert len(_documented_calls()) > 40
    assert wrong == []
