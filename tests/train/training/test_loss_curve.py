from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsast_train.training.run import LossCurve


def _curve() -> LossCurve:
    """Three stages; the untrained loss is larger at one end, and training over-fits after step 20."""
    rows = [
        (0, (1.0, 0.1, 0.01), (1.0, 0.1, 0.01)),
        (20, (0.9, 0.08, 0.007), (0.9, 0.07, 0.006)),
        (40, (0.7, 0.09, 0.010), (0.6, 0.05, 0.004)),
    ]
    return LossCurve([dict(zip(("step", "held_out", "training"), row, strict=True)) for row in rows])


def test_relative_loss_is_the_mean_over_stages_and_the_best_the_lowest() -> None:
    curve = _curve()
    untrained, middle, last = curve.evaluations
    assert curve.relative(untrained) == 1
    assert curve.relative(middle) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert curve.relative(last, "training") == pytest.approx((0.6 + 0.5 + 0.4) / 3)
    assert curve.best() is middle  # the plain mean would take the last
    curve.evaluations.append({**middle, "step": 60})
    assert curve.best() is middle


def test_save_writes_json_and_picture(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "red.curve.json"
    _curve().save(path, {"name": "red"})
    document = json.loads(path.read_text())
    assert (document["format"], document["name"], document["best_step"]) == (1, "red", 20)
    assert [row["step"] for row in document["evaluations"]] == [0, 20, 40]
    assert document["evaluations"][1]["relative_held_out"] == pytest.approx(0.8)
    assert sorted(file.name for file in path.parent.iterdir()) == ["red.curve.json", "red.curve.png"]
    with Image.open(path.with_suffix(".png")) as picture:
        picture.load()
        assert picture.width >= 600
        colours = set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two colours: both curves are there
