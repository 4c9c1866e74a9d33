from typing import Any

import pytest
import torch

from lsast_engines.bundle.style import style_name_faults
from lsast_engines.errors import UsageError
from lsast_train.options import PRESETS, TrainOptions


def test_paper_preset_has_the_papers_values():
    paper = PRESETS["paper"]
    assert (paper.steps, paper.batch, paper.size, paper.lr, paper.weight_decay) == (100_000, 1, 512, 5e-6, 0.01)
    assert (paper.variant, paper.generator, paper.weighting) == ("step+layer", "attention", "eps")
    assert (paper.prompt, paper.map_lr) == ("auto", 1.0)
    rates = [paper.learning_rate(step) for step in (0, 19_999, 20_000, 99_999)]
    assert rates == pytest.approx([5e-6, 5e-6, 5e-7, 5e-7])


def test_released_preset_has_the_released_values():
    """docs/method.md §3."""
    released = PRESETS["released"]
    assert (released.steps, released.batch, released.size, released.weight_decay) == (100_000, 1, 512, 0.01)
    assert (released.variant, released.generator, released.layout) == ("step+layer", "geglu", "overlap")
    assert (released.gradient, released.crop, released.views, released.rows) == ("decoder", "squash", 1, 1)
    assert (released.prompt, released.mixed_precision, released.weighting) == ("auto", "no", "eps")
    assert {released.learning_rate(step) for step in (0, 20_000, 99_999)} == {1e-6}


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_learning_rate_equals_torchs_schedulers(schedule):
    options = TrainOptions(steps=40, lr=0.2, schedule=schedule, decay_after=15)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler: Any = {
        "step": torch.optim.lr_scheduler.MultiStepLR(optimizer, [15], gamma=0.1),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40),
        "constant": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    }[schedule]
    optimizer.param_groups[0]["lr"] = 0.2
    for step in range(40):
        assert options.learning_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        scheduler.step()


def test_train_options_with_invalid_values_report_all():
    wrong: dict[str, Any] = {
        "variant": "layers", "generator": "mlp", "layout": "diagonal", "gradient": "none", "schedule": "linear",
        "prompt": "caption", "placeholder_tokens": 0,
        "crop": "centre", "weighting": "x0", "mixed_precision": "fp8",
        "steps": 0, "batch": 1.5, "size": 32, "views": 0,
        "seed": -1, "evaluate_every": 0, "evaluate_latents": 0, "lr": 0.0, "map_lr": -1.0,
        "weight_decay": float("nan"), "decay_after": -1, "checkpoint_minutes": 0.0,
    }  # fmt: skip
    with pytest.raises(UsageError) as caught:
        TrainOptions(**wrong)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split(":")[0].removeprefix("  - ") for line in lines) == sorted(wrong)


def test_style_names_are_letters_digits_and_some_signs():
    assert not any(map(style_name_faults, ("vangogh", "Claude-Monet_2.1", "0")))
    assert all(map(style_name_faults, ("", "../up", "a/b", ".hidden", "-x", "a b", "x" * 101, "naïve", "a\n")))
