"""Contact sheets: every cell is the painting that its labels name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lsast import PictureError, UsageError
from lsast.images.contact_sheet import CELL, contact_sheet, parse_axes

AXES: dict[str, list[Any]] = {
    "strength": [0.3, 0.7, 1.0],
    "control_scale": [0.0, 2.0],
    "style": ["vangogh", "monet@up"],
}


def test_contact_sheet_cell_is_the_painting_of_its_options(stylizer, photo):
    reported: list[tuple[int, int]] = []
    sheet = contact_sheet(stylizer, photo, AXES, on_cell=lambda *progress: reported.append(progress), guidance=3.0)
    assert list(sheet.cells) == [(s, c, style) for style in AXES["style"] for c in (0.0, 2.0) for s in (0.3, 0.7, 1.0)]
    for (strength, control, style), box in sheet.cells.items():
        alone = stylizer.stylize(photo, style, strength=strength, control_scale=control, guidance=3.0).image
        difference = np.asarray(sheet.image.crop(box)).astype(int) - np.asarray(alone)
        assert np.abs(difference).max() <= 1
    assert reported == [(done, 12) for done in range(13)]
    # Strengths in columns, from left to right, the others in rows, from top to bottom.
    lefts = {strength: box[0] for (strength, *_), box in sheet.cells.items()}
    tops = {key[1:]: box[1] for key, box in sheet.cells.items()}
    assert [*lefts.values()] == sorted({box[0] for box in sheet.cells.values()})
    assert [*tops.values()] == sorted({box[1] for box in sheet.cells.values()})


def test_contact_sheet_labels_lie_beside_their_cells(stylizer, photo):
    def sheet(values: list[float]) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
        made = contact_sheet(stylizer, photo, {"control_scale": [1.0], "guidance": values}, steps=1)
        return np.asarray(made.image), list(made.cells.values())

    image, boxes = sheet([1.0, 3.0])
    other, _ = sheet([1.0, 8.0])
    first, second = (image[box[1] : box[3], : box[0]] for box in boxes)
    assert (first < 128).sum() > 50, "dark text on white"
    assert (image[: boxes[0][1], boxes[0][0] :] < 128).sum() > 50
    assert (first != second).any()
    assert (first == other[boxes[0][1] : boxes[0][3], : boxes[0][0]]).all()
    assert (second != other[boxes[1][1] : boxes[1][3], : boxes[1][0]]).any()


def test_contact_sheet_scales_large_paintings_and_puts_transparent_ones_on_white(stylizer):
    rgba = np.zeros((500, 1000, 4), np.uint8)
    sheet = contact_sheet(stylizer, rgba, {"seed": [0]}, size=64)
    ((left, top, right, bottom),) = sheet.cells.values()
    assert (right - left, bottom - top) == (CELL, CELL // 2)
    assert (np.asarray(sheet.image.crop((left, top, right, bottom))) == 255).all()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        *(([text], "expected an option and its values") for text in ("strength", "strength=", "strength=1,,2")),
        (["colour=red"], "the axis colour, no option; expected one of style, steps"),
        (["guidance-low=200"], "the axis guidance_low, which was removed: use cache_interval"),
        (["seed=1", "seed=2"], "the axis seed, twice"),
    ],
)
def test_parse_axes_with_invalid_axes_raises(texts, words):
    with pytest.raises(UsageError, match=words):
        parse_axes(texts)


def test_lsast_run_with_grid_writes_a_sheet(run, stylizer, photo):
    axes = ("--grid", "strength = 0.3, 0.7", "--grid", "style=monet,vangogh:0.5+monet")
    result = run("in.png", "sheet.png", "--json", *axes)
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert (report["cells"], report["axes"]) == (4, {"strength": [0.3, 0.7], "style": ["monet", "vangogh:0.5+monet"]})
    with Image.open("sheet.png") as saved:
        np.testing.assert_array_equal(saved, contact_sheet(stylizer, photo, report["axes"]).image)
    others = ("--grid", "keep-colour=true,false", "--grid", "fit=aspect,stretch", "--grid", "steps=1")
    masked = run("in.png", "sheet.png", "--mask", "in.png", "--size", "64", *others, "--json")
    assert json.loads(masked.stdout)["axes"] == {
        "keep_colour": [True, False],
        "fit": ["aspect", "stretch"],
        "steps": [1],
    }


def test_contact_sheet_that_cannot_be_made_is_refused_before_it_is_painted(stylizer, photo):
    painted: list[int] = []
    count = {"on_cell": lambda done, _: painted.append(done)}
    spoilt: tuple[dict[str, list[Any]], ...] = (
        {"strength": [0.3, 7.0]}, {"style": ["monet", "picasso"]}, {"keep_colour": [True, "yes"]}, {"mask": [photo]},
    )  # fmt: skip
    for axes in spoilt:
        with pytest.raises(UsageError):
            contact_sheet(stylizer, photo, axes, **count)
    many = {"seed": list(range(16383 // photo.shape[1] + 1))}
    for out in (Path("sheet.webp"), "sheet.webp"):
        with pytest.raises(PictureError, match="expected at most 16383 a side in WEBP"):
            contact_sheet(stylizer, photo, many, out=out, steps=1, **count)
    wrong: tuple[tuple[dict[str, Any], Any, str], ...] = (
        ({"seed": [1]}, 3, "found int as path; expected the name of a file"),
        ({"seed": range(10_001)}, "sheet.webp", "found axes of 10001 combinations"),
        ({"seed": range(10**20)}, None, "combinations; expected at most 10000"),
        ({"strength": np.array(0.5)}, None, "found no axis, or one without a list of values"),
        *(({name: "monet"}, None, "found no axis, or one without a list of values") for name in ("style", 3)),
    )
    with pytest.raises(UsageError, match="found int as on_cell"):
        contact_sheet(stylizer, photo, {"seed": [1]}, on_cell=3)  # type: ignore[arg-type]
    for axes, place, words in wrong:
        with pytest.raises(UsageError, match=words):
            contact_sheet(stylizer, photo, axes, out=place, **count)
    assert painted == []
