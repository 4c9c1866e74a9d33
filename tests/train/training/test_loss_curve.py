from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsast_train.training.loss_curve import Curve, Evaluation, save_curve


def _curve() -> Curve:
    """Three stages; the untrained loss is larger at one end, and training over-fits after step 20."""
    return Curve(
        [
            Evaluation(0, (1.0, 0.1, 0.01), (1.0, 0.1, 0.01)),
            Evaluation(20, (0.9, 0.08, 0.007), (0.9, 0.07, 0.006), 0.4, 1e-2),
            Evaluation(40, (0.7, 0.09, 0.010), (0.6, 0.05, 0.004), 0.3, 5e-3),
        ]
    )


def test_curve_relative_is_the_mean_over_stages() -> None:
    curve = _curve()
    untrained, middle, last = curve.evaluations
    assert curve.relative(untrained) == 1
    assert curve.relative(middle) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert curve.relative_training(last) == pytest.approx((0.6 + 0.5 + 0.4) / 3)
    assert curve.best() is middle  # the plain mean would take the last
    curve.evaluations.append(Evaluation(60, middle.held_out, middle.training))
    assert curve.best() is middle


def test_save_curve_writes_json_and_picture(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "red.curve.json"
    save_curve(_curve(), path, {"name": "red"})
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
