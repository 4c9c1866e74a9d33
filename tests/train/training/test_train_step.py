"""The cost of a training step: on a tiny base that it is measured rightly, on one of full size (slow) that it fits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from benchmarks.train_step import training_step_cost
from lsast_train.base.base import Base
from lsast_train.evaluation import ValidationSet
from lsast_train.inversion import Inversion
from lsast_train.options import PRESETS, TrainOptions
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_file import load_prompts

ROOMS = os.pathsep.join(str(Path(__file__).parents[3] / room) for room in ("engines", "train", ""))

FULL_SIZE = """
import sys
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from dataclasses import replace
from lsast_train.base.base import BaseConfig, build_base
from lsast_train.base.mini_autoencoder import MiniAutoencoder
from lsast_train.options import PRESETS
from benchmarks.train_step import training_step_cost

preset, precision, checkpointing = sys.argv[1:]
unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
assert sum(p.numel() for p in unet.parameters()) == 859_520_964  # Stable Diffusion 1.5's
text = CLIPTextModel(CLIPTextConfig(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
))
control = ControlNetModel(
    down_block_types=("DownBlock2D",), block_out_channels=(32,), cross_attention_dim=768,
    conditioning_embedding_out_channels=(4, 4, 4, 4),
)
facts = BaseConfig("full", "sd15", "epsilon", 77, 512, 0.18215)
base = build_base(
    facts, "0" * 64, unet, control, MiniAutoencoder((4, 4, 4), (4, 4, 4)), torch.zeros(77, 768), text_encoder=text
)
if precision == "bf16":
    base.round_unet("bf16")
options = replace(PRESETS[preset], mixed_precision=precision, gradient_checkpointing=checkpointing == "on")
cost = training_step_cost(base, options, steps=1)
print(cost.seconds, cost.peak_rss, cost.loss)
"""


def test_training_step_cost_measures_seconds_memory_and_loss(text_base: Base) -> None:
    options = replace(PRESETS["released"], size=64)
    cost = training_step_cost(text_base, options)
    assert 0 < cost.seconds < 60
    assert 0.3 < cost.loss < 3
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        assert cost.peak_rss == pytest.approx(1024 * int(found[1]), rel=0.1)
    again = training_step_cost(text_base, replace(options, gradient_checkpointing=True))
    assert again.loss == cost.loss


def test_training_step_cost_trains_the_prompts(text_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step's loss differs from that of a step that learned nothing."""
    options = TrainOptions(generator="direct", size=64, lr=1.0)
    learned = training_step_cost(text_base, options).loss
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    assert training_step_cost(text_base, options).loss != learned


def test_seconds_and_hours_are_told_before_the_first_evaluation_and_change_nothing(
    base: Base, collection: PaintingDataset, brief: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    told = Inversion(base, collection, brief, "told", tmp_path / "told")
    with monkeypatch.context() as patch:
        patch.setattr(ValidationSet, "losses", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            told.run()
    found = re.search(r"([\d.e-]+) s a step: ([\d.e-]+) hours for at most 10 more", caplog.text)
    assert found is not None
    # 10 steps, and one evaluation of 10 stages of 4 + 4 latents, each 4 rows of which take half a step.
    assert float(found[2]) == pytest.approx(float(found[1]) * (10 + 10) / 3600, rel=0.1)
    silent = Inversion(base, collection, brief, "silent", tmp_path / "silent")
    monkeypatch.setattr(silent, "_estimate_time", lambda: None)
    results = [load_prompts(run.run().file).prompts for run in (told, silent)]
    assert torch.equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "gigabytes"),
    [
        (("released", "no", "off"), 8.0),
        (("paper", "no", "off"), 7.0),
        (("paper", "no", "on"), 6.0),
        (("paper", "bf16", "off"), 5.0),
        (("paper", "bf16", "on"), 5.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_training_step_of_full_size_fits_into_memory(setting: tuple[str, ...], gigabytes: float) -> None:
    ran: Any = subprocess.run(
        [sys.executable, "-c", FULL_SIZE, *setting],
        env={**os.environ, "PYTHONPATH": ROOMS},
        capture_output=True,
        text=True,
        check=True,
    )
    _, peak, loss = map(float, ran.stdout.split())
    assert peak / 1e9 < gigabytes
    assert 0.1 < loss < 10
