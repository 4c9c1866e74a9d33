"""Contact sheets: one picture painted over a grid of options, with labels."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from lsast_engines.errors import UsageError
from lsast_engines.images import read_picture
from lsast_engines.removed import REMOVED_OPTIONS, RENAMED_OPTIONS

from ..options.options import Options, rules
from .canvas import Canvas
from .formats import check_format

if TYPE_CHECKING:
    from ..request import Picture
    from ..stylizer import Stylizer

CELL = 320
"""Largest width and height of a painting on a sheet, in pixels."""

MOST_CELLS = 10_000
"""Most paintings on a sheet."""

_GAP, _TEXT, _LINE = 8, 16, 22
"""Pixels between paintings, of the letters, and of a line."""


@dataclass(frozen=True)
class Sheet:
    """A contact sheet."""

    image: Image.Image
    """RGB."""
    cells: dict[tuple[Any, ...], tuple[int, int, int, int]]
    """Left, top, right and bottom pixel of each painting, by the values of the axes in their order."""
    options: Options
    """The options of all paintings, before the axes change them."""


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parse axes such as ``strength=0.4,0.6`` and ``style=vangogh,monet``; a `UsageError` for a syntax error, a name
    that is no option or comes twice, or an axis without a value."""
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        name = RENAMED_OPTIONS.get(name, name)
        if not equals or not all(value.strip() for value in values.split(",")):
            raise UsageError(f"found the axis {text!r}; expected an option and its values, such as strength=0.4,0.6")
        if name in REMOVED_OPTIONS:
            raise UsageError(f"found the axis {name}, which was removed: {REMOVED_OPTIONS[name][1]}")
        if name not in rules() or name in axes:
            which = "twice" if name in axes else "no option"
            raise UsageError(f"found the axis {name}, {which}; expected one of {', '.join(rules())}, each once")
        axes[name] = [_value(name, value.strip()) for value in values.split(",")]
    return axes


def contact_sheet(
    stylizer: Stylizer,
    picture: Picture,
    axes: Mapping[str, Sequence[Any]],
    *,
    on_cell: Callable[[int, int], None] | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Sheet:
    """Paint a picture with every combination of some options.

    Args:
        stylizer, picture: see `Stylizer.stylize`.
        axes: the values of an option, by its name. The first axis runs along the columns, the second down the rows,
            every further one over blocks of rows.
        on_cell: called with the number of paintings done and the number there are, before the first and after each.
        out: where the sheet will be saved; a sheet too large for its format is refused.
        options: options of all paintings, see `Stylizer.stylize_many`.

    Raises:
        LsastError: see `Stylizer.stylize`; all options and the size of the sheet are checked before the first painting.
        UsageError: no axis, one without a value, or more than `MOST_CELLS` combinations.
    """
    given = axes.items() if isinstance(axes, Mapping) else ()
    counts = [_count(axis) if isinstance(name, str) else 0 for name, axis in given]
    if not counts or not all(counts):
        raise UsageError("found no axis, or one without a list of values; expected such as {'strength': [0.4, 0.6]}")
    if not (on_cell is None or callable(on_cell)):
        raise UsageError(f"found {type(on_cell).__name__} as on_cell; expected a function of two arguments")
    if (total := math.prod(counts)) > MOST_CELLS:
        raise UsageError(f"found axes of {total} combinations; expected at most {MOST_CELLS}: give fewer values")
    if "mask" in axes:
        raise UsageError("found an axis 'mask', which is no option; expected the argument mask, for all paintings")
    across, *down = axes
    down.reverse()  # the last axis changes most slowly
    columns, rows = list(axes[across]), list(itertools.product(*(axes[name] for name in down)))
    combinations = [{across: column, **dict(zip(down, row, strict=True))} for row in rows for column in columns]
    mask = options.pop("mask", None)
    common = stylizer.resolve(**options)
    resolved = [stylizer.resolve(**{**options, **combination}) for combination in combinations]
    row_labels = ["\n".join(f"{name} {value}" for name, value in zip(down, row, strict=True)) for row in rows]
    column_labels = [f"{across} {value}" for value in columns]
    source = read_picture(picture, stylizer.max_megapixels)  # once; a stream cannot be read again
    if mask is not None:
        options["mask"] = read_picture(mask, stylizer.max_megapixels)
    canvases = [Canvas.fit(source.size, o.size, stylizer.bundle.manifest.multiple, o.fit) for o in resolved]
    sizes = [_thumbnail_size(canvas.own[::-1]) for canvas in canvases]
    cell = max(width for width, _ in sizes), max(height for _, height in sizes)
    image, corners = _labelled_sheet(cell, column_labels, row_labels, out)
    cells = {}
    if on_cell:
        on_cell(0, total)
    pictures: Iterable[Any] = itertools.repeat(source, total)
    results = stylizer.stylize_many(pictures, rows=combinations, **options)
    for combination, (left, top), result in zip(combinations, corners, results, strict=True):
        painting = _thumbnail(result.image)
        image.paste(painting, (left, top))
        cells[tuple(combination[name] for name in axes)] = (left, top, left + painting.width, top + painting.height)
        if on_cell:
            on_cell(len(cells), total)
    return Sheet(image, cells, common)


def _count(axis: Any) -> int:
    """How many values an axis has; 0 for what is no list of values."""
    try:
        return 0 if isinstance(axis, (str, bytes, bytearray)) or not isinstance(axis, Collection) else len(axis)
    except TypeError:  # an array without a dimension
        return 0
    except OverflowError:
        return sys.maxsize


def _labelled_sheet(
    cell: tuple[int, int], column_labels: Sequence[str], row_labels: Sequence[str], out: str | Path | None
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """A sheet without paintings, and the left and top pixel of each, row by row; all are at most as large as `cell`."""
    font = ImageFont.load_default(_TEXT)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = _GAP + max(int(pen.multiline_textbbox((0, 0), label, font)[2]) + 1 for label in row_labels)
    lefts = [margin + column * (cell[0] + _GAP) for column in range(len(column_labels) + 1)]
    tops = [_LINE + _GAP + row * (cell[1] + _GAP) for row in range(len(row_labels) + 1)]
    if out is not None:
        check_format(out, (lefts[-1], tops[-1]))
    image = Image.new("RGB", (lefts.pop(), tops.pop()), "white")
    pen = ImageDraw.Draw(image)
    for left, label in zip(lefts, column_labels, strict=True):
        pen.text((left, _GAP // 2), label, "black", font)
    for top, label in zip(tops, row_labels, strict=True):
        pen.multiline_text((_GAP // 2, top), label, "black", font)
    return image, [(left, top) for top in tops for left in lefts]


def _thumbnail_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1, CELL / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _thumbnail(painting: Image.Image) -> Image.Image:
    small = painting.resize(_thumbnail_size(painting.size), Image.Resampling.LANCZOS, reducing_gap=2)
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    return small.convert("RGB")


def _value(name: str, text: str) -> Any:
    """The value of an option in its type; what is of no such type stays a text, which the options refuse."""
    kind = rules()[name].type
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text
