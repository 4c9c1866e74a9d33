"""The report of the bench as Markdown, and bar charts."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lsast_engines.files import replace_file

Row = dict[str, Any]

NOTABLE = 0.1
"""Share of a cold start from which a part is set in bold."""

PLAIN, MUTED = "#2f6fb3", "#a3a9b2"
"""Colours of bars: of what is looked at, and of what it is compared with."""


def markdown(report: Row) -> str:
    """All tables of a report."""
    parts = [_machine(report)]
    rows = [row for row in report["rows"] if row["warm"]]
    if report["peak_flops"]:
        parts.append(_peak_flops(report["peak_flops"]))
    if rows:
        parts += [_pictures(rows), _graphs(rows)]
    if any(row["cold"] for row in rows):
        parts.append(_cold([row for row in rows if row["cold"]]))
    failed = [f"- {row['name']}: {row['error']}" for row in report["rows"] if row["error"]]
    if failed:
        parts.append("Not measured:\n\n" + "\n".join(failed))
    parts += [f"Note: {note}" for note in report["notes"]]
    return "\n\n".join(parts)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _machine(report: Row) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = report["threads"] or "the backend's choice"
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags'])})",
            f"{machine['system']}, {versions}",
            f"{report['bundle']}; threads: {threads}; n = {report['repeats']}; median (spread); load of the machine "
            f"at the beginning {_number(machine['load'])}, at the end {_number(report['load_at_end'])}",
        ]
    )


def _peak_flops(rates: dict[str, dict[str, float]]) -> str:
    rows = [
        (compute_dtype, f"{max(by.values()):.0f}", ", ".join(f"{name} {rate:.0f}" for name, rate in by.items()))
        for compute_dtype, by in rates.items()
    ]
    return "The limit, 10⁹ multiply-accumulates a second:\n\n" + table(("compute_dtype", "best", "of"), rows)


def _pictures(rows: Sequence[Row]) -> str:
    heads = ("", "painted", "picture s", "step s", "first s", "GMAC", "of the limit", "peak MB", "cold s", "cold CPU s")
    lines = []
    for row in rows:
        warm, cold = row["warm"], row["cold"]
        peaks = [figures["peak_mb"] for figures in (warm, cold) if figures and figures["peak_mb"] is not None]
        lines.append(
            (
                row["name"],
                "x".join(map(str, reversed(warm["painted"]))),
                _seconds(warm["picture"]),
                _seconds(warm["step"]),
                f"{warm['first_s']:.2f}",
                _number(warm.get("gmac"), 0),
                _percent(warm.get("fraction")),
                _number(max(peaks, default=None), 0),
                _seconds(cold and cold["total"]),
                _seconds(cold and cold["cpu"]),
            )
        )
    return "Pictures (in a batch: of each), models open:\n\n" + table(heads, lines)


def _graphs(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        phases = row["warm"]["phases"]
        listing = ", ".join(f"{name} {_seconds(found)}" for name, found in phases.items())
        for name, graph in row["warm"]["graphs"].items():
            runs = sum(group["runs"] for group in graph["shapes"])
            figures = (_seconds(graph["run"]), _number(graph.get("gmac"), 1), _percent(graph.get("fraction")))
            lines.append((row["name"], name, str(runs), *figures, ""))
        lines.append((row["name"], "phases", "", "", "", "", listing))
    heads = ("", "graph", "runs", "run s", "GMAC", "of the limit", "seconds of a picture")
    return "Graphs and phases:\n\n" + table(heads, lines)


def _cold(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        parts = sorted(row["cold"]["parts"].items(), key=lambda item: -item[1]["median"])
        shown = [
            f"{'**' if part['share'] > NOTABLE else ''}{name} {part['median']:.2f} s ({part['share']:.0%})"
            f"{'**' if part['share'] > NOTABLE else ''}"
            for name, part in parts
            if part["share"] >= 0.01
        ]
        lines.append((row["name"], _seconds(row["cold"]["total"]), ", ".join(shown)))
    heads = ("", "total s", f"parts of at least 1 %; above {NOTABLE:.0%} in bold")
    return "A new process, from its start to its end, with one picture saved:\n\n" + table(heads, lines)


def _seconds(summary: dict[str, float] | None) -> str:
    return "-" if summary is None else f"{summary['median']:.3g} ({summary['spread']:.2g})"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def draw_bars(
    path: Path,
    title: str,
    bars: Sequence[tuple[str, float, str]],
    unit: str = "seconds a picture",
    colours: Sequence[str] | None = None,
) -> None:
    """Draw horizontal bars into a PNG, dark on white, which can be read on a page of either theme.

    Args:
        path: the file to write.
        title: over the chart; long ones are wrapped.
        bars: label, length, and what is written at the end of each, from top to bottom.
        unit: of the lengths.
        colours: of each bar; `PLAIN` if None.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    # As wide as a page of GitHub (about 830 pixels), at twice its density.
    figure = Figure(figsize=(8.3, 1.1 + 0.34 * len(bars)), dpi=200, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    places = range(len(bars))
    drawn = axes.barh(places, [length for _, length, _ in bars], color=colours or PLAIN, height=0.72)
    axes.bar_label(drawn, [note for _, _, note in bars], padding=4, fontsize=10)
    axes.set_yticks(places, [label for label, _, _ in bars], fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.22, y=0.02)
    axes.set_xlabel(unit, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(textwrap.fill(title, 110), fontsize=9, color="#444444")
    with replace_file(path) as handle:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        # A palette takes a quarter of the space.
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(48).save(handle, "PNG", optimize=True)
