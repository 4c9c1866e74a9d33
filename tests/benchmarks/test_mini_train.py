"""`benchmarks.mini.train`: its commands against their parsers; nothing is trained."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks.mini.train import main
from benchmarks.mini.training.__main__ import main as training_command
from lsast_export.cli.main import main as export_command
from lsast_train.cli.main import command as train_command

PROGRAMS = {
    "lsast_train": train_command,
    "lsast_export": export_command,
    "benchmarks.mini.training": training_command,
}


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that `main` starts, each from its program's name on; the third ends with status 1, once."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, int(len(commands) == 3), '{"loss": 1.5}\n')

    monkeypatch.setattr(subprocess, "run", run)
    for folder in ("paintings/van-gogh", "paintings/monet", "photos", "taesd"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    arguments = "--paintings paintings --photos photos --teacher taesd --style vangogh=van-gogh --style monet=monet"
    monkeypatch.setattr(sys, "argv", ["train", *arguments.split(), "--seconds", "60", "--threads", "1", "--out", "new"])
    return commands


def test_train_stopped_goes_on_and_ends_with_the_bundle(started):
    with pytest.raises(SystemExit, match="'finetune vangogh' ended with status 1"):
        main()
    Path("new/tuned/vangogh").mkdir(parents=True)  # what the stopped step leaves behind
    Path("new/tuned/vangogh/vangogh.checkpoint.safetensors").touch()
    Path("new/learned/monet").mkdir(parents=True)  # a step that was killed before its first checkpoint
    main()
    lines = [json.loads(line) for line in Path("new/train.jsonl").read_text().splitlines()]
    names = ["base", "learn vangogh", "finetune vangogh", "learn monet", "finetune monet", "decoder", "bundle"]
    assert [line["step"] for line in lines] == names
    assert lines[0]["output"] == [{"loss": 1.5}]
    assert len(started) == len(names) + 1
    assert started[3] == [*started[2][:-1], "--resume"]
    assert started[2][-1] == started[4][-1] == "--overwrite"


def test_train_commands_are_those_of_the_trainer_and_the_exporter(started):
    with pytest.raises(SystemExit):
        main()
    main()
    for program, *words in started:
        root: click.Group = PROGRAMS[program]
        with root.make_context(program, list(words)) as context:
            if words[0] in root.commands:
                root.commands[words[0]].make_context(words[0], words[1:], parent=context)
    *_, decoder, bundle = started
    assert "new/tuned/monet/monet.prompts.safetensors=paintings/monet" in decoder
    assert "new/touched/prompts/monet.prompts.safetensors" in bundle
