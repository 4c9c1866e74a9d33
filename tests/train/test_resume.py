"""Runs that are stopped and go on, and checkpoints that do not fit."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lsast_engines.errors import TrainingError
from lsast_train.base.base import Base
from lsast_train.inversion import Inversion
from lsast_train.mini.architecture import MiniConfig, build_mini
from lsast_train.options import TrainOptions
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_file import load_prompts
from lsast_train.training.run import InterruptionError

InterruptAt = Callable[[int], None]
Invert = Callable[..., Inversion]


def test_resumed_inversion_equals_the_uninterrupted_one_bit_for_bit(
    invert: Invert, tmp_path: Path, interrupt_at: InterruptAt
) -> None:
    def make(folder: str, **how: Any) -> Inversion:
        return invert(build_mini(MiniConfig.tiny()), folder, evaluate_every=8, **how)

    straight = make("straight").run()
    # Part of the mean loss since the last evaluation is carried over.
    interrupt_at(6)
    with pytest.raises(InterruptionError, match=r"after step 6; .* --resume") as caught:
        make("parts").run()
    assert caught.value.exit_code == 130
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["red.checkpoint.safetensors"]
    resumed = make("parts", resume=True).run()
    assert resumed.file.read_bytes() == straight.file.read_bytes()
    assert resumed.curve.read_text() == straight.curve.read_text()
    assert (resumed.steps, resumed.best_step) == (10, straight.best_step)
    assert not (tmp_path / "parts" / "red.checkpoint.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "kind",
    [
        {"generator": "geglu", "layout": "overlap", "gradient": "decoder"},
        {"generator": "attention", "placeholder_tokens": 2},
    ],
    ids=lambda kind: " ".join(map(str, kind.values())),
)
def test_resumed_inversion_through_a_text_encoder_equals_the_uninterrupted_one(
    text_base: Base, invert: Invert, interrupt_at: InterruptAt, kind: dict[str, Any]
) -> None:
    """Bit for bit, with the generator's dropout."""
    lr = 0.01 if kind["generator"] == "geglu" else 1.0
    options = {**kind, "lr": lr, "map_lr": 0.0, "batch": 6, "evaluate_latents": 2}
    before = copy.deepcopy(text_base.text_encoder.state_dict())
    straight = invert(text_base, "straight", **options).run()
    assert (straight.best_step, straight.relative_loss < 0.9999) == (10, True)
    interrupt_at(4)
    with pytest.raises(InterruptionError):
        invert(text_base, "parts", **options).run()
    resumed = invert(text_base, "parts", resume=True, **options).run()
    assert resumed.file.read_bytes() == straight.file.read_bytes()
    assert all(torch.equal(v, before[k]) for k, v in text_base.text_encoder.state_dict().items())
    prompts = load_prompts(straight.file, text_base)
    assert prompts.prompts.shape == (10, 3, 77, 24)
    assert prompts.prompt == "text"
    assert json.loads(prompts.meta["options"])["generator"] == kind["generator"]


def test_checkpoint_that_does_not_fit_the_run_is_refused(
    base: Base, invert: Invert, collection: PaintingDataset, brief: TrainOptions, tmp_path: Path,
    interrupt_at: InterruptAt,
) -> None:  # fmt: skip
    with pytest.raises(TrainingError, match=r"found no checkpoint .* start without --resume"):
        invert(base, resume=True)
    interrupt_at(1)
    with pytest.raises(InterruptionError):
        invert(base).run()
    with pytest.raises(TrainingError, match="unfinished run"):
        invert(base)
    others = PaintingDataset(collection.training[1:], collection.held_out, "other paintings")
    with pytest.raises(TrainingError) as caught:
        Inversion(base, others, replace(brief, lr=0.2, seed=7), "red", tmp_path, resume=True)
    found = {line.split(":")[0].strip(" -") for line in str(caught.value).splitlines()[1:]}
    assert found == {"lr", "seed", "paintings"}
    with pytest.raises(TrainingError, match="other options"):
        invert(base, resume=True, variant="global")
    checkpoint = tmp_path / "red.checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="not a checkpoint"):
        invert(base, resume=True)
