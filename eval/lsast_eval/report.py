"""The report of an evaluation, made with some options: as a table, as JSON, and as a contact sheet."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from lsast_engines.declared_options import Range, option_faults
from lsast_engines.environment import package_version
from lsast_engines.errors import UsageError, fault_list
from lsast_engines.files import cache_home, replace_file
from lsast_engines.images import read_on_white

from .metrics.artist_classifier import ClassifierQuality
from .metrics.intervals import CONFIDENCE, Score, score_of

FORMAT = 3
"""Format number of the report's JSON."""
SMALL_SET = 2000
"""Number of pictures below which FID depends more on their number than on their style."""

_CELL, _GAP, _TEXT = 256, 8, 15
"""Pixels: longer side of a picture, space between two, height of the letters."""
_PAPER, _INK = (250, 250, 248), (30, 30, 30)


@dataclass(frozen=True)
class EvalOptions:
    """Options of `evaluate`.

    Raises:
        UsageError: invalid values; all at once.
    """

    size: Annotated[int, Range(64)] = 512
    """Shorter side, in pixels, at which a result is compared with its content.

    A content is only ever shrunk to it, and a result is brought to the content's height and width.
    """
    bootstrap: Annotated[int, Range(20)] = 300
    """Resamplings behind an interval."""
    seed: Annotated[int, Range(0)] = 0
    """Seed of the resampling, and of the draw of works in the reference row."""
    cache: Path | None = None
    """Folder for features by file hash. [default: ``eval`` in ``$LSAST_HOME``, else in lsast's XDG cache folder]"""

    def __post_init__(self) -> None:
        if faults := option_faults(EvalOptions, vars(self)):
            raise UsageError(fault_list("invalid options:", faults))

    def cache_folder(self) -> Path:
        """Where features are kept; it need not exist."""
        return self.cache or cache_home() / "eval"


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    name: str
    better: Literal["lower", "higher"]
    about: Literal["style", "content"]


@dataclass(frozen=True)
class Row:
    """The scores of one method, or of a reference."""

    name: str
    """The method's; a reference's is in parentheses."""
    count: int
    """How many pictures were scored."""
    scores: Mapping[str, Score]
    """Metric → score; a reference may lack some."""
    pictures: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    """Stem → content metrics of the picture, ``taken_for`` (its predicted class) and ``nearest`` (file of a work)."""


@dataclass(frozen=True)
class Report:
    """The scores of all methods on one artist."""

    artist: str
    works: int
    """How many works the pictures were compared with."""
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    """Methods in the order they were given, then references."""
    judges: Mapping[str, ClassifierQuality]
    """The classifier behind each deception score; empty without."""
    notes: tuple[str, ...]
    """Caveats, for whoever quotes a figure."""
    options: EvalOptions
    columns: Sequence[tuple[str, Sequence[Path]]] = field(repr=False)
    """Columns of the contact sheet: heading, and a file for each content, sorted by stem."""

    def row(self, name: str) -> Row:
        """The row of a method or reference.

        Raises:
            UsageError: there is none of that name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UsageError(f"found no row {name!r}; expected one of {', '.join(row.name for row in self.rows)}")

    def difference(self, metric: str, one: str, other: str) -> Score:
        """`one` minus `other`, with the interval of the difference over the same resamplings of the contents.

        Two methods paint the same contents, so the difference is far surer than two separate intervals suggest.

        Raises:
            UsageError: no such row, or one of them lacks the metric.
        """
        scores = [self.row(name).scores.get(metric) for name in (one, other)]
        if scores[0] is None or scores[1] is None:
            known = ", ".join(entry.name for entry in self.metrics)
            raise UsageError(f"found no {metric!r} of both {one!r} and {other!r}; the metrics are {known}")
        a, b = scores[0], scores[1]
        return score_of(a.value - b.value, a.replicates - b.replicates)

    def table(self) -> str:
        """Metrics as lines, methods side by side, each figure with its interval; notes below."""
        lines = [["", *(row.name for row in self.rows)], ["n", *(str(row.count) for row in self.rows)]]
        for metric in self.metrics:
            cells = [_cell(row.scores.get(metric.name)) for row in self.rows]
            lines.append([f"{metric.name} {'↓' if metric.better == 'lower' else '↑'}", *cells])
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        heading = f"{self.artist}: against {self.works} works; intervals of {CONFIDENCE:.0%}"
        return "\n".join([heading, "", *text, "", *(f"* {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        methods = [row.name for row in self.rows if not row.name.startswith("(")]
        return {
            "format": FORMAT,
            "artist": self.artist,
            "works": self.works,
            "metrics": {metric.name: {"better": metric.better, "about": metric.about} for metric in self.metrics},
            "methods": {name: _row_json(self.row(name)) for name in methods},
            "references": {row.name: _row_json(row) for row in self.rows if row.name not in methods},
            "judges": {metric: asdict(quality) for metric, quality in self.judges.items()},
            "notes": list(self.notes),
            "options": {name: value for name, value in asdict(self.options).items() if name != "cache"},
            "versions": {name: package_version(name) for name in ("lsast", "numpy", "torch")},
        }

    def sheet(self, path: Path, rows: int = 12) -> None:
        """Write a contact sheet as PNG, whole: content, every method's result, and the nearest work.

        Args:
            rows: how many contents at most, spread evenly over all.

        Raises:
            UsageError: `rows` below 1.
        """
        if rows < 1:
            raise UsageError(f"found {rows} rows; expected at least 1")
        from PIL import Image, ImageDraw, ImageFont, ImageOps

        count = self.rows[0].count
        picked = np.unique(np.linspace(0, count - 1, min(rows, count)).round().astype(int))
        font = ImageFont.load_default(_TEXT)
        top, step = 2 * _TEXT + _GAP, _CELL + _GAP
        sheet = Image.new("RGB", (len(self.columns) * step + _GAP, top + len(picked) * step), _PAPER)
        draw = ImageDraw.Draw(sheet)
        for column, (label, files) in enumerate(self.columns):
            while len(label) > 1 and draw.textlength(label, font) > _CELL:
                label = label[:-2] + "…"
            draw.text((_GAP + column * step, _GAP), label, _INK, font)
            for line, index in enumerate(picked):
                picture = Image.fromarray(read_on_white(files[index]))
                cell = ImageOps.pad(picture, (_CELL, _CELL), Image.Resampling.LANCZOS, _PAPER)
                sheet.paste(cell, (_GAP + column * step, top + line * step))
        with replace_file(path) as handle:
            sheet.save(handle, format="PNG")


def _row_json(row: Row) -> dict[str, Any]:
    scores = {name: {"value": score.value, "low": score.low, "high": score.high} for name, score in row.scores.items()}
    return {"n": row.count, "scores": scores, "pictures": {stem: dict(values) for stem, values in row.pictures.items()}}


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    digits = 1 if abs(score.value) >= 10 else 3
    return f"{score.value:.{digits}f} [{score.low:.{digits}f}, {score.high:.{digits}f}]"
