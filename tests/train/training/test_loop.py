from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lsast_engines.errors import TrainingError
from lsast_train.training.loop import TrainingLoop, require_finite, set_learning_rate


class _Counter:
    """A run that adds the step's number to a weight."""

    def __init__(self, folder: Path, steps: int = 6, **changes: Any) -> None:
        self.module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.module.weight)
        optimizer = torch.optim.SGD(self.module.parameters())
        self.means: list[float] = []
        own = {name: changes.pop(name) for name in ("checkpoint_minutes", "seconds") if name in changes}
        options = SimpleNamespace(**{"steps": steps, "evaluate_every": 4, "checkpoint_minutes": 1e6, **own})
        settings: dict[str, Any] = {"identity": {"seed": 0}, **changes}
        self.loop = TrainingLoop("count", options, folder / "c", {"module": self.module}, optimizer, **settings)

    def step(self, step: int) -> float:
        with torch.no_grad():
            self.module.weight += step
        return float(step)

    def evaluate(self, mean: float) -> None:
        self.means.append(mean)
        self.loop.history.append({"step": self.loop.step, "mean": mean})

    def run(self, **how: Any) -> None:
        self.loop.run(self.step, self.evaluate, **how)


def test_loop_evaluates_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    counter = _Counter(tmp_path)
    counter.run()
    assert (counter.loop.step, counter.means) == (6, [(0 + 1 + 2 + 3) / 4, (4 + 5) / 2])
    assert not counter.loop.checkpoint.exists()


def test_loop_saves_checkpoints_at_the_interval_of_the_writing_process(tmp_path: Path) -> None:
    _Counter(tmp_path, checkpoint_minutes=0.0, writes=False).run()
    assert not (tmp_path / "c").exists()
    _Counter(tmp_path, checkpoint_minutes=0.0).run()
    assert (tmp_path / "c").exists()


def test_loop_with_a_limit_ends_evaluated_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, left = [100.0], []
    monkeypatch.setattr("lsast_train.training.loop.time", SimpleNamespace(monotonic=lambda: clock[0]))
    counter = _Counter(tmp_path, steps=1000, seconds=20.0)
    step, evaluate = counter.step, counter.evaluate

    def slow_step(number: int) -> float:
        clock[0] += 1
        left.append(counter.loop.time_left)
        return step(number)

    def slow_evaluation(mean: float) -> None:
        clock[0] += 2
        evaluate(mean)

    counter.loop.run(slow_step, slow_evaluation)
    # Steps of 1 s, evaluations of 2 s after 4, 8 and 12 steps: a 13th step and its evaluation would end at 121.
    assert (counter.loop.step, clock[0]) == (12, 118.0)
    assert [entry["step"] for entry in counter.loop.history] == [4, 8, 12]
    assert left[:5] == [1.0, 0.95, 0.9, 0.85, 0.7]
    counter.loop.limit = 0.0
    counter.loop.run(slow_step, slow_evaluation)
    assert counter.loop.step == 13  # at least one step


def test_helpers_of_a_step_refuse_what_cannot_go_on() -> None:
    with pytest.raises(TrainingError, match="loss of step 7 is nan"):
        require_finite(float("nan"), 7)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "relative": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.2)
    assert optimizer.param_groups[0]["lr"] == 0.1
