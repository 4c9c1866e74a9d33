"""The same command under ``accelerate launch``, as on a machine with two GPUs, but on the CPU (gloo)."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from lsast_train.base.lazy_base import save_base
from lsast_train.inversion import Inversion
from lsast_train.options import PRESETS
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_file import load_prompts

HERE = Path(__file__).parent
PACKAGES = os.pathsep.join(str(HERE.parents[1] / package) for package in ("engines", "train"))
STEPS = 3


def test_two_processes_average_their_gradients_and_write_once(base, paintings, tmp_path):
    save_base(base, tmp_path / "base")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["--style", "red", "--images", str(paintings), "--base", str(tmp_path / "base")]
    command += ["--steps", str(STEPS), "--batch", "2", "--size", "64", "--mixed-precision", "no"]
    completed = subprocess.run(
        [sys.executable, *launch, str(HERE / "launched.py"), str(tmp_path), *command],
        env={**os.environ, "PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    printed = [line for line in completed.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch's own
    assert printed == ["runs/red/red.prompts.safetensors"]
    assert completed.stderr.count(f"hours for at most {STEPS} more; peak memory") == 1
    found = [load_file(tmp_path / f"process{index}.safetensors") for index in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert sorted(path.name for path in (tmp_path / "runs" / "red").iterdir()) == [
        "red.curve.json",
        "red.curve.png",
        "red.prompts.safetensors",
    ]
    assert load_prompts(tmp_path / "runs/red/red.prompts.safetensors").meta["processes"] == "2"

    # The same in one process, by hand: the mean of the losses that both processes drew.
    options = replace(PRESETS["quick"], steps=STEPS, batch=2, size=64, mixed_precision="no")
    collection = PaintingDataset.load(paintings, 64, painted=base.config.size, progress=False)
    alone = Inversion(base, collection, options, "red", tmp_path / "alone")
    loss_sum = 0.0
    for step in range(STEPS):
        for group in alone.optimizer.param_groups:
            group["lr"] = group["relative"] * options.learning_rate(step)
        alone.optimizer.zero_grad()
        loss = (alone.loss(step, 0) + alone.loss(step, 1)) / 2
        torch.autograd.backward(loss)
        alone.optimizer.step()
        loss_sum += loss.item()
    expected = {"matrices": alone.space.matrices, **alone.space.attention_weights()}
    for name, tensor in expected.items():
        # Adam makes a step of lr out of rounding where a gradient is nearly zero; hence the median.
        error = (found[0][name] - tensor).abs()
        assert error.median() < 1e-6, name
        assert error.quantile(0.99) < 1e-4, name
    last = json.loads((tmp_path / "runs/red/red.curve.json").read_text())["evaluations"][-1]
    torch.testing.assert_close(last["loss"], loss_sum / STEPS, rtol=1e-4, atol=1e-6)
    by_hand = alone.held_out.losses(alone.space, range(10))
    torch.testing.assert_close(torch.tensor(last["held_out"], dtype=torch.float64), by_hand, rtol=1e-3, atol=1e-6)
