from pathlib import Path

import numpy as np
import pytest

from lsast_engines.errors import PictureError, UsageError
from lsast_eval.matching import match_by_stem

from .conftest import save

DOT = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for stem in ("b", "a", "c"):
        save(tmp_path / "contents", stem, DOT)
        save(tmp_path / "one" / "deep", stem, DOT)
        save(tmp_path / "two", stem, DOT)
    return {name: tmp_path / name for name in ("contents", "one", "two")}


def test_match_by_stem_orders_results_like_contents_and_leaves_out_extra_ones(folders, caplog):
    (folders["two"] / "a.png").rename(folders["two"] / "a.webp")
    save(folders["one"], "sheet", DOT)
    matches = match_by_stem(folders["contents"], {"one": folders["one"], "two": folders["two"]})
    assert matches.stems == ("a", "b", "c")
    assert list(matches.results) == ["one", "two"]
    for group in (matches.contents, *matches.results.values()):
        assert [path.stem for path in group] == ["a", "b", "c"]
    assert matches.results["two"][0].suffix == ".webp"
    assert matches.notes == ("one: left out sheet, for which there is no content",)
    assert caplog.messages == list(matches.notes)


def test_match_by_stem_lists_all_faults(folders, tmp_path):
    (folders["two"] / "b.png").unlink()
    save(folders["one"], "c", DOT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PictureError) as caught:
        match_by_stem(
            folders["contents"],
            {"one": folders["one"], "two": folders["two"], "three": tmp_path / "empty", "four": tmp_path / "no"},
        )
    text = str(caught.value)
    assert "two: found no result for b of 3 contents" in text
    assert "one: " in text
    assert "c.png have the same stem" in text
    assert "three: found no picture" in text
    assert "four: found no folder" in text


@pytest.mark.parametrize("name", ["(works)", ""])
def test_match_by_stem_refuses_names_of_reference_rows(folders, name):
    with pytest.raises(UsageError, match="method names"):
        match_by_stem(folders["contents"], {name: folders["one"]})
    with pytest.raises(UsageError, match="found no method"):
        match_by_stem(folders["contents"], {})
