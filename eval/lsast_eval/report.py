"""The report of an evaluation: as a table, as JSON, and as a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lsast_engines.environment import package_version
from lsast_engines.errors import UsageError

from .contact_sheet import SheetRow, write_sheet
from .metrics.artist_classifier import ClassifierQuality
from .metrics.intervals import CONFIDENCE, Score, score_of
from .options import EvalOptions

FORMAT = 3
"""Format number of the report's JSON."""
SMALL_SET = 2000
"""Number of pictures below which FID depends more on their number than on their style."""

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    name: str
    better: Better
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
    files: tuple[SheetRow, ...] = field(repr=False)

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
        picked = np.unique(np.linspace(0, len(self.files) - 1, min(rows, len(self.files))).round().astype(int))
        write_sheet(path, [self.files[index] for index in picked], self.artist)


def _row_json(row: Row) -> dict[str, Any]:
    scores = {name: {"value": score.value, "low": score.low, "high": score.high} for name, score in row.scores.items()}
    return {"n": row.count, "scores": scores, "pictures": {stem: dict(values) for stem, values in row.pictures.items()}}


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    digits = 1 if abs(score.value) >= 10 else 3
    return f"{score.value:.{digits}f} [{score.low:.{digits}f}, {score.high:.{digits}f}]"
