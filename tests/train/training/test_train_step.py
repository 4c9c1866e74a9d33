"""The cost of a training step: on a tiny base that it is measured rightly, on one of full size (slow) that it fits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
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


def test_training_step_cost_measures_seconds_memory_and_loss(text_base: Base) -> None:
    options = replace(PRESETS["released"], size=64)
    cost = training_step_cost(text_base, options)
    assert 0 < cost.seconds < 60
    assert 0.3 < cost.loss < 3
    assert training_step_cost(text_base, replace(options, gradient_checkpointing=True)).loss == cost.loss


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
