"""The day on a card is rehearsed: every step of every call runs on the CPU, at tiny sizes, and reports."""

import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from benchmarks.gpu_day import run, train_steps
from benchmarks.gpu_day.pack import LARGEST, pack_picture
from benchmarks.gpu_day.run import ROOT, steps
from benchmarks.mini.training.__main__ import main as training_command

KIT = ROOT / "benchmarks" / "gpu_day"


@pytest.mark.slow
@pytest.mark.parametrize("call", ["engines", "parity", "train"])
def test_call_runs_every_step_on_the_cpu(call, tmp_path, monkeypatch):
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run, "WORK", tmp_path / "work")
    pictures = tmp_path / "pictures"
    for label in (*(f"paintings/{label}" for label, _ in train_steps.STYLES.values()), "photos/objects"):
        (pictures / label).mkdir(parents=True)
        for index in range(24):
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).resize((96, 96)).save(pictures / label / f"{index}.png")
    monkeypatch.setattr("sys.argv", ["run", call, "--out", str(tmp_path), "--pictures", str(pictures), "--rehearse"])
    run.main()
    results = [json.loads(line) for line in (tmp_path / f"{call}.jsonl").read_text().splitlines()]
    assert [result["step"] for result in results] == [step.name for step in steps(call, tmp_path, True, pictures, 1)]
    assert [result for result in results if result["status"] != 0 or "result" not in result] == []


def test_decoder_step_names_a_command_of_the_training(tmp_path, monkeypatch):
    commands = []

    def start(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(subprocess, "run", start)
    (tmp_path / "photos").mkdir()
    (tmp_path / "monet.prompts.safetensors").touch()
    train_steps.decoder(tmp_path, tmp_path, tmp_path, tmp_path / "touched", "cpu", rehearse=True)
    assert commands[0][1:4] == ["-m", "benchmarks.mini.training", "decoder"]
    context = training_command.commands["decoder"].make_context("decoder", commands[0][4:])
    assert context.params["styles"] == (f"{tmp_path}/monet.prompts.safetensors={tmp_path}/paintings/claude-monet",)


def test_commands_for_the_card_stop_below_the_limit_of_a_call():
    lines = [line for line in (KIT / "README.md").read_text().splitlines() if "gpu_day/call.sh" in line]
    assert [line.partition("call.sh ")[2].split()[0] for line in lines] == ["parity", "pictures", "engines", "train"]
    assert max(float(limit) for limit in re.findall(r"timeout (\d+) ", "\n".join(lines))) <= 600


def test_packed_picture_is_small_and_keeps_its_shape(tmp_path):
    Image.linear_gradient("L").resize((1000, 800)).convert("RGB").save(tmp_path / "a.png")
    size = pack_picture(tmp_path / "a.png", tmp_path / "out" / "a.avif", 55)
    with Image.open(tmp_path / "out" / "a.avif") as picture:
        assert abs(picture.width / picture.height - 1.25) < 0.01
        assert picture.width * picture.height <= LARGEST * 1.01
    assert size == (tmp_path / "out" / "a.avif").stat().st_size
    Image.new("RGB", (90, 400)).save(tmp_path / "b.png")
    assert pack_picture(tmp_path / "b.png", tmp_path / "out" / "b.avif", 55) == 0
