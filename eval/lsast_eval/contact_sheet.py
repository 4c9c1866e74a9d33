"""The contact sheet: a row for each content, its results side by side, and the nearest real work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lsast_engines.files import replace_file
from lsast_engines.images import read_on_white

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
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    font = ImageFont.load_default(_TEXT)
    first = next(iter(rows[0].results))
    labels = ["content", *rows[0].results, f"{artist}: nearest to {first}"]
    top, step = 2 * _TEXT + _GAP, _CELL + _GAP
    sheet = Image.new("RGB", (len(labels) * step + _GAP, top + len(rows) * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        while len(label) > 1 and draw.textlength(label, font) > _CELL:
            label = label[:-2] + "…"
        draw.text((_GAP + column * step, _GAP), label, _INK, font)
    for line, row in enumerate(rows):
        for column, file in enumerate((row.content, *row.results.values(), row.nearest)):
            picture = Image.fromarray(read_on_white(file))
            cell = ImageOps.pad(picture, (_CELL, _CELL), Image.Resampling.LANCZOS, _PAPER)
            sheet.paste(cell, (_GAP + column * step, top + line * step))
    with replace_file(path) as handle:
        sheet.save(handle, format="PNG")
