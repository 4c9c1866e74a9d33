import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lsast_engines.errors import PictureError, UsageError
from lsast_engines.images import read_on_white
from lsast_eval import EvalOptions, Report, evaluate
from lsast_eval.metrics.efficientnet import EffNetLite
from lsast_eval.metrics.feature_cache import FeatureCache

from .conftest import COUNT, WORKS, hand, save, scene


@pytest.fixture(scope="module")
def methods(studio: Path) -> dict[str, Path]:
    """Methods whose order is known: more and more of the artist's texture, less and less of the content."""
    folders = {name: studio / "methods" / name for name in ("photo", "mix", "real", "shuffled", "other", "blur")}
    for seed in range(COUNT):
        content, stem = scene(seed).astype(float), f"scene{seed}"
        work = hand("stripes", 100 + seed)
        save(folders["photo"], stem, scene(seed))
        save(folders["mix"], stem, (0.6 * content + 0.4 * work).astype(np.uint8))
        save(folders["real"], stem, work)
        # The very files of "mix", each under the name of another content.
        save(folders["shuffled"], f"scene{(seed + 1) % COUNT}", (0.6 * content + 0.4 * work).astype(np.uint8))
        save(folders["other"], stem, hand("blots", 100 + seed))
        save(folders["blur"], stem, cv2.GaussianBlur(scene(seed), (0, 0), 4))
    return folders


def judge(studio: Path, methods: dict[str, Path], cache: Path, bootstrap: int = 20, **given: Any) -> Report:
    """Score methods against the artist of stripes; `given` are arguments of `evaluate`."""
    given = {"artists": studio / "artists", "options": EvalOptions(cache=cache, bootstrap=bootstrap), **given}
    return evaluate(studio / "contents", studio / "artists" / "stripes", methods=methods, progress=False, **given)


@pytest.fixture(scope="module")
def report(studio: Path, methods: dict[str, Path], cache: Path) -> Report:
    return judge(studio, methods, cache, bootstrap=60, photos=studio / "photos")


def test_report_of_unchanged_photos_is_perfect_content_and_no_style(report):
    for name in ("photo", "(contents)"):
        scores = report.row(name).scores
        assert scores["ssim"].value == scores["edge_f1"].value == 1
        assert scores["lpips"].value == pytest.approx(0, abs=1e-6)
        assert scores["cfsd"].value == pytest.approx(0, abs=1e-6)
        assert scores["deception"].value == 0


def test_deception_score_separates_artists(report):
    assert report.row("real").scores["deception"].value == 1
    assert report.row("other").scores["deception"].value == 0
    assert {values["taken_for"] for values in report.row("other").pictures.values()} == {"blots"}
    assert {values["taken_for"] for values in report.row("photo").pictures.values()} == {"photos"}
    facts = report.judges["deception"]  # the contents differ from the photos, and no method's file is among the works
    assert facts.classes == {"blots": WORKS, "stripes": WORKS, "photos": WORKS}
    assert facts.recall == report.row("(works)").scores["deception"].value
    assert set(facts.false_alarms) == {"blots", "photos"}


@pytest.mark.parametrize("metric", ["fid", "kid"])
def test_style_metrics_order_by_style(report, metric):
    value = {row.name: row.scores[metric].value for row in report.rows}
    assert value["(works)"] < value["mix"] < value["photo"]
    assert value["real"] < value["mix"]
    assert value["real"] < value["other"]
    assert value["shuffled"] == pytest.approx(value["mix"], rel=1e-4)  # the same set in another order


@pytest.mark.parametrize(("metric", "sign"), [("lpips", -1), ("cfsd", -1), ("ssim", 1), ("edge_f1", 1)])
def test_content_metrics_order_by_content(report, metric, sign):
    value = {row.name: sign * row.scores[metric].value for row in report.rows if metric in row.scores}
    assert value["photo"] > max(value["blur"], value["mix"])
    assert value["mix"] > max(value["real"], value["shuffled"])


def test_scores_lie_in_their_intervals_and_artfid_is_a_product(report):
    for row in report.rows:
        if row.name != "(works)":
            lpips, fid, artfid = (row.scores[name].value for name in ("lpips", "fid", "artfid"))
            assert artfid == pytest.approx((1 + lpips) * (1 + fid))
        for name, score in row.scores.items():
            assert score.low <= score.value + 1e-12 and score.value <= score.high + 1e-12, (row.name, name)  # noqa: PT018
            if name not in report.judges:  # of FID the bootstrap lies above the figure, so it is centred
                assert score.replicates.mean() == pytest.approx(score.value, abs=1e-9), (row.name, name)
    assert report.row("real").scores["deception"].low > 0.5  # Wilson's: all of few is not certainty


def test_difference_has_a_narrower_interval(report):
    score = report.difference("ssim", "mix", "real")
    one, other = (report.row(name).scores["ssim"] for name in ("mix", "real"))
    assert score.value == pytest.approx(one.value - other.value)
    assert 0 < score.low < score.value < score.high
    assert report.difference("fid", "mix", "shuffled").value == pytest.approx(0, abs=0.01)
    with pytest.raises(UsageError, match="found no row 'their'"):
        report.difference("fid", "their", "mix")
    with pytest.raises(UsageError, match="'vgg'"):
        report.difference("vgg", "mix", "real")


def test_nearest_work_of_a_copied_work_is_itself(studio, cache, tmp_path):
    for seed in range(COUNT):
        save(tmp_path / "copies", f"scene{seed}", hand("stripes", seed))
    report = judge(studio, {"copies": tmp_path / "copies"}, cache)
    nearest = {stem: values["nearest"] for stem, values in report.row("copies").pictures.items()}
    assert nearest == {f"scene{seed}": f"w{seed}.png" for seed in range(COUNT)}
    assert [work.name for work in report.columns[-1][1]] == [f"w{seed}.png" for seed in range(COUNT)]
    # Copies of works are judged, so they may not have been trained on.
    assert report.judges["deception"].classes == {"blots": WORKS, "stripes": WORKS - COUNT}
    assert any(note.startswith(f"copies: {COUNT} results are works themselves") for note in report.notes)
    assert any(note.startswith("no photos among the classes") for note in report.notes)


def test_table_and_json_agree(report):
    table = report.table()
    document = json.loads(json.dumps(report.to_json()))
    lines = table.splitlines()
    assert lines[0] == f"stripes: against {WORKS} works; intervals of 95%"
    assert lines[2].split() == ["photo", "mix", "real", "shuffled", "other", "blur", "(contents)", "(works)"]
    for name, row in document["methods"].items():
        assert row["n"] == COUNT
        column = lines[2].index(f" {name}") + 1
        for metric, score in row["scores"].items():
            (line,) = (line for line in lines if line.startswith(metric + " "))
            assert float(line[column:].split()[0]) == pytest.approx(score["value"], abs=0.06)
        assert set(row["pictures"]) == {f"scene{seed}" for seed in range(COUNT)}
    assert list(document["references"]) == ["(contents)", "(works)"]
    assert f"{document['judges']['deception']['accuracy']:.3f}" in table
    assert f"biased upwards below 2000 pictures: {COUNT} results, {WORKS} works" in table
    assert any("EfficientNet-Lite0" in note for note in document["notes"])


def test_sheet_shows_content_results_and_nearest_work(report, tmp_path):
    report.sheet(tmp_path / "sheet.png", rows=3)
    sheet = read_on_white(tmp_path / "sheet.png")
    assert sheet.shape[1] == 8 * 264 + 8
    assert sheet.shape[0] == 30 + 3 * 264 + 8
    top = 38
    for column, (_, files) in enumerate(report.columns):
        cell = sheet[top : top + 256, 8 + 264 * column : 264 * (column + 1)]
        assert np.abs(cell[::2, ::2].astype(int) - read_on_white(files[0])).mean() < 12
    with pytest.raises(UsageError, match="found 0 rows"):
        report.sheet(tmp_path / "sheet.png", rows=0)


def test_evaluate_scores_without_artists_and_refuses_unknown_ones_and_small_classes(studio, cache, methods, tmp_path):
    photo = {"photo": methods["photo"]}
    report = judge(studio, photo, cache, artists=None, artist="Stripes")
    assert (report.artist, report.judges) == ("Stripes", {})
    assert "deception" not in {metric.name for metric in report.metrics} | report.row("photo").scores.keys()
    few = tmp_path / "artists"
    shutil.copytree(studio / "artists" / "stripes", few / "stripes")
    for seed in range(4):
        save(few / "dots", f"w{seed}", hand("blots", seed))
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (UsageError, r"found no artist 'dots'.*blots, stripes", {"artist": "dots"}),
        (UsageError, "found no dots to leave out", {"leave_out": ["dots"]}),
        (UsageError, "found one class, stripes", {"leave_out": ["blots"]}),
        (UsageError, r"dots \(4\); expected at least 5", {"artists": few}),
        (PictureError, "found no folder", {"artists": tmp_path / "no"}),
    ]
    for error, message, given in wrong:
        with pytest.raises(error, match=message):
            judge(studio, photo, cache, **given)


def test_feature_cache_computes_each_file_once(cache, tmp_path, caplog, monkeypatch):
    network, calls = EffNetLite(), list[int]()
    whole = network.features
    monkeypatch.setattr(network, "features", lambda batch: calls.append(len(batch)) or whole(batch))
    store = FeatureCache(network, cache / "own", batch=2, progress=False)
    paths = [save(tmp_path, f"p{seed}", scene(seed)) for seed in range(3)]
    paths.append(save(tmp_path, "twin", scene(0)))
    first = store.vectors(paths)
    assert calls == [2, 1]
    np.testing.assert_array_equal(first[0], first[3])
    np.testing.assert_array_equal(store.vectors(paths[::-1]), first[::-1])
    assert calls == [2, 1]
    (damaged,) = store._folder.rglob(f"{store.digest(paths[1])}.npy")
    damaged.write_bytes(b"\x93NUMPY")
    np.testing.assert_allclose(store.vectors(paths), first, atol=1e-4)
    assert calls == [2, 1, 1]
    assert "computing again" in caplog.text
    assert store._file(store.digest(paths[1])).stat().st_size > 1000
