"""The contact sheet: a row for each content, its results side by side, and the nearest real work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lsast_engines.files import replace_file
from lsast_engines.images import read_on_white

if TYPE_CHECKING:
    from PIL import Image

_CELL, _GAP, _TEXT = 256, 8, 15
"""Pixels: longer side of a picture, space between two, height of the letters."""
_PAPER, _INK = (250, 250, 248), (30, 30, 30)


@dataclass(frozen=True)
class SheetRow:
    """The files of one row."""

    content: Path
    results: Mapping[str, Path]
    """Method → its result."""
    nearest: Path
    """The work nearest to the first method's result, in feature space."""


def write_sheet(path: Path, rows: Sequence[SheetRow], artist: str) -> None:
    """Draw `rows` (at least one) and write the PNG at `path`, whole."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TEXT)
    first = next(iter(rows[0].results))
    labels = ["content", *rows[0].results, f"{artist}: nearest to {first}"]
    heading = 2 * _TEXT
    drawn = [[_fitted(file) for file in (row.content, *row.results.values(), row.nearest)] for row in rows]
    heights = [max(picture.height for picture in line) for line in drawn]
    width = len(labels) * (_CELL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, heading + sum(height + _GAP for height in heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        while len(label) > 1 and draw.textlength(label, font) > _CELL:
            label = label[:-2] + "…"
        draw.text((_GAP + column * (_CELL + _GAP), _GAP), label, _INK, font)
    top = heading + _GAP
    for line, height in zip(drawn, heights, strict=True):
        for column, picture in enumerate(line):
            left = _GAP + column * (_CELL + _GAP) + (_CELL - picture.width) // 2
            sheet.paste(picture, (left, top + (height - picture.height) // 2))
        top += height + _GAP
    with replace_file(path) as handle:
        sheet.save(handle, format="PNG")


def _fitted(path: Path) -> Image.Image:
    """The picture with its longer side at `_CELL` pixels."""
    from PIL import Image

    picture = Image.fromarray(read_on_white(path))
    scale = _CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)
