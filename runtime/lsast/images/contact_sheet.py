"""Contact sheets: one picture painted over a grid of options, with labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lsast_engines.errors import UsageError
from lsast_engines.removed import REMOVED_OPTIONS, RENAMED_OPTIONS

from ..options.options import rules

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

    from ..request import Picture
    from ..stylizer import Stylizer

CELL = 320
"""Width and height that a painting may take on a sheet, in pixels."""

_GAP = 8
_TEXT = 16
_LINE = 22


@dataclass(frozen=True)
class Sheet:
    """A contact sheet."""

    image: Image.Image
    """RGB."""
    cells: dict[tuple[Any, ...], tuple[int, int, int, int]]
    """By the values of its axes, in their order: where a painting is, as left, top, right and bottom pixel."""


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Axes from texts such as ``strength=0.4,0.6`` and ``style=vangogh,monet``.

    Raises:
        UsageError: no such text, a name that is no option or comes twice, or an axis without a value.
    """
    names = rules()
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        name = RENAMED_OPTIONS.get(name, name)
        if not equals or not all(value.strip() for value in values.split(",")):
            raise UsageError(f"found the axis {text!r}; expected an option and its values, such as strength=0.4,0.6")
        if name in REMOVED_OPTIONS:
            raise UsageError(f"found the axis {name}, which was removed: {REMOVED_OPTIONS[name][1]}")
        if name not in names or name in axes:
            which = "twice" if name in axes else "no option"
            raise UsageError(f"found the axis {name}, {which}; expected one of {', '.join(names)}, each once")
        axes[name] = [_value(value.strip()) for value in values.split(",")]
    return axes


def contact_sheet(
    stylizer: Stylizer,
    picture: Picture,
    axes: Mapping[str, Sequence[Any]],
    *,
    on_cell: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Sheet:
    """Paint a picture with every combination of some options.

    Args:
        stylizer: paints.
        picture: as `Stylizer.stylize` takes it.
        axes: by the name of an option, its values. The first runs along the columns, the second down the rows, every
            further one over blocks of rows.
        on_cell: called with the paintings done and those there are, before the first and after each.
        options: options of all paintings, as `Stylizer.stylize_many` takes them.

    Raises:
        LsastError: see `Stylizer.stylize`.
        UsageError: no axis, or one without a value.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not axes or not all(axes.values()):
        raise UsageError("found no axis, or one without a value; expected such as {'strength': [0.4, 0.6]}")
    across, *down = axes
    columns = list(axes[across])
    rows = list(itertools.product(*(axes[name] for name in reversed(down))))  # the last axis changes most slowly
    total = len(columns) * len(rows)
    combinations = [
        {across: column, **dict(zip(reversed(down), row, strict=True))} for row in rows for column in columns
    ]
    if on_cell:
        on_cell(0, total)
    pictures = itertools.repeat(picture, total)
    thumbnails = []
    for done, result in enumerate(stylizer.stylize_many(pictures, rows=combinations, **options), start=1):
        thumbnails.append(_thumbnail(result.image))
        if on_cell:
            on_cell(done, total)

    font = ImageFont.load_default(_TEXT)
    labels = ["\n".join(f"{name} {value}" for name, value in zip(reversed(down), row, strict=True)) for row in rows]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max((_width(pen, label, font) for label in labels), default=0) + _GAP
    width, height = thumbnails[0].size
    head = _LINE + _GAP
    size = (margin + len(columns) * (width + _GAP), head + len(rows) * (height + _GAP))
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for index, value in enumerate(columns):
        pen.text((margin + index * (width + _GAP), _GAP // 2), f"{across} {value}", "black", font)
    cells = {}
    for index, (combination, thumbnail) in enumerate(zip(combinations, thumbnails, strict=True)):
        row, column = divmod(index, len(columns))
        left, top = margin + column * (width + _GAP), head + row * (height + _GAP)
        image.paste(thumbnail, (left, top))
        cells[tuple(combination[name] for name in axes)] = (left, top, left + width, top + height)
        if column == 0:
            pen.multiline_text((_GAP // 2, top), labels[row], "black", font)
    return Sheet(image, cells)


def _thumbnail(painting: Image.Image) -> Image.Image:
    from PIL import Image

    small = painting.copy()
    small.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    return small.convert("RGB")


def _width(pen: ImageDraw.ImageDraw, label: str, font: Any) -> int:
    """Pixels that a label of one or more lines takes."""
    return int(pen.multiline_textbbox((0, 0), label, font)[2]) + 1


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
