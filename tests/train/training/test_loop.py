"""The training loop, its random numbers and its loss curve."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lsast_train.training.loop import TrainingLoop
from lsast_train.training.rng import RngStream, rng_for
from lsast_train.training.run import LossCurve


@pytest.fixture
def _curves_not_drawn() -> None:
    """They are drawn here."""


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


def test_loop_saves_checkpoints_at_the_interval_of_the_writing_process(tmp_path):
    _Counter(tmp_path, checkpoint_minutes=0.0, writes=False).run()
    assert not (tmp_path / "c").exists()
    _Counter(tmp_path, checkpoint_minutes=0.0).run()
    assert (tmp_path / "c").exists()


def test_loop_evaluates_at_the_interval_and_at_the_end_within_its_limit(tmp_path, monkeypatch):
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
    assert left[:5] == [1.0, 0.95, 0.9, 0.85, 0.7]
    counter.loop.limit = 0.0
    counter.loop.run(slow_step, slow_evaluation)
    assert counter.loop.step == 13  # at least one step
    assert [entry["step"] for entry in counter.loop.history] == [4, 8, 12, 13]
    assert counter.means == [(0 + 1 + 2 + 3) / 4, (4 + 5 + 6 + 7) / 4, (8 + 9 + 10 + 11) / 4, 12]
    assert not counter.loop.checkpoint.exists()


def test_rng_for_other_streams_and_numbers_differs():
    keys = [(seed, purpose, *rest) for seed in (0, 1) for purpose in RngStream for rest in ((), (1,), (0, 1), (1, 1))]
    drawn = {torch.rand(1, generator=rng_for(*key), dtype=torch.float64).item() for key in keys}
    assert len(drawn) == len(keys)
    assert torch.rand(1, generator=rng_for(*keys[7])) == torch.rand(1, generator=rng_for(*keys[7]))


def _curve() -> LossCurve:
    """Three stages; the untrained loss is larger at one end, and training over-fits after step 20."""
    rows = [
        (0, (1.0, 0.1, 0.01), (1.0, 0.1, 0.01)),
        (20, (0.9, 0.08, 0.007), (0.9, 0.07, 0.006)),
        (40, (0.7, 0.09, 0.010), (0.6, 0.05, 0.004)),  # the plain mean would take it
        (60, (0.9, 0.08, 0.007), (0.9, 0.07, 0.006)),  # as good as the second
    ]
    return LossCurve([dict(zip(("step", "held_out", "training"), row, strict=True)) for row in rows])


def test_save_writes_json_and_picture(tmp_path):
    path = tmp_path / "deep" / "red.curve.json"
    _curve().save(path, {"name": "red"})
    document = json.loads(path.read_text())
    assert (document["format"], document["name"], document["best_step"]) == (1, "red", 20)
    assert [row["step"] for row in document["evaluations"]] == [0, 20, 40, 60]
    for part, expected in (("held_out", [1, 0.8, 2.6 / 3, 0.8]), ("training", [1, 2.2 / 3, 0.5, 2.2 / 3])):
        assert [row[f"relative_{part}"] for row in document["evaluations"]] == pytest.approx(expected)
    assert sorted(file.name for file in path.parent.iterdir()) == ["red.curve.json", "red.curve.png"]
    with Image.open(path.with_suffix(".png")) as picture:
        picture.load()
        assert picture.width >= 600
        colours = set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two colours: both curves are there


def test_curve_or_log_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    for name in ("red.json", "red.png"):
        (tmp_path / name).mkdir()
    _curve().save(tmp_path / "red.json", {})
    assert [record.getMessage().split("'")[1] for record in caplog.records] == [
        str(tmp_path / "red.json"),
        str(tmp_path / "red.png"),
    ]
    _Counter(tmp_path).loop.write_log(tmp_path / "red.json")
    assert len(caplog.records) == 3
