"""What `compare.py` measured, as Markdown and as a bar chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench.report import MUTED, PLAIN, draw_bars, table

Row = dict[str, Any]

REFERENCE = "reference"
"""The peer that the others are compared with."""


def markdown(report: Row) -> str:
    """The table of all rows, what they were measured on, and what was not measured."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    limits = ", ".join(f"{name} {max(by.values()):.0f}" for name, by in report["peak_flops"].items())
    repeats = report["repeats"] or "1, ours with their first picture"
    heads = (
        "",
        "picture s (spread)",
        "of the reference fp32",
        "steps s (spread)",
        "step: of the reference in its type",
        "GMAC",
        "step: of the limit",
        "peak MB",
    )
    return "\n\n".join(
        [
            f"{Path(report['bundle']).name} at {report['size']}², n = {repeats}; {machine['cpu']}, "
            f"{machine['cores']} cores; {versions}; load {machine['load']:.2f} … {report['load_at_end']:.2f}",
            f"The limit, 10⁹ multiply-accumulates a second: {limits}; that of a row is what its products are in",
            table(heads, [line(row, report["rows"]) for row in report["rows"]]),
            "Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in report["not_measured"].items()),
        ]
    )


def line(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """One row of the table."""
    if row["error"]:
        return (row["name"], row["error"], *[""] * 6)
    return (
        row["name"],
        f"{seconds(row['picture'])} ({row['picture']['spread']:.2g}){extrapolation(row)}",
        ratio(row, base(rows, "fp32"), "picture"),
        f"{row['steps']} of {row['step']['median']:.3g} ({row['step']['spread']:.2g})",
        ratio(row, base(rows, row["compute_dtype"]), "step"),
        "-" if row["gmac"] is None else f"{row['gmac']:.0f}",
        "-" if row["step_fraction"] is None else f"{row['step_fraction']:.0%}",
        "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
    )


def seconds(summary: Row) -> str:
    """The median, to a second or to three digits."""
    return f"{summary['median']:.0f}" if summary["median"] >= 1000 else f"{summary['median']:.3g}"


def extrapolation(row: Row) -> str:
    """What is said of a picture of which only some steps were measured."""
    return "" if row["extrapolated"] is None else f", from {row['extrapolated']} steps"


def base(rows: Sequence[Row], compute_dtype: str) -> Row | None:
    """The reference in a compute dtype, if it was measured."""
    found = [
        row for row in rows if row["by"] == REFERENCE and row["compute_dtype"] == compute_dtype and not row["error"]
    ]
    return found[0] if found else None


def ratio(row: Row, reference: Row | None, what: str) -> str:
    """How many times as fast as the reference."""
    return "-" if reference is None else f"{reference[what]['median'] / row[what]['median']:.2f} x"


def chart(report: Row, path: Path, only: Sequence[str] = (), title: str | None = None) -> None:
    """Draw the seconds of a picture as bars, peers muted.

    Args:
        report: see `compare.main`.
        path: a PNG.
        only: texts of which a row's name has one, if it is drawn; none: every row is.
        title: what is said before how much was measured; None: bundle, size and machine.
    """
    machine, rows = report["machine"], report["rows"]
    shown = [row for row in rows if not row["error"] and (not only or any(text in row["name"] for text in only))]
    reference = base(rows, "fp32")
    bars = []
    for row in shown:
        times = f", {ratio(row, reference, 'picture')}" if reference not in (None, row) else ""
        bars.append((row["name"], row["picture"]["median"], f"{seconds(row['picture'])} s{times}"))
    title = title or f"{Path(report['bundle']).name} at {report['size']}², {machine['cpu']}, {machine['cores']} cores"
    extrapolated = sorted({row["extrapolated"] for row in shown} - {None})
    if extrapolated:
        title += f"; grey: from {', '.join(map(str, extrapolated))} measured steps"
    draw_bars(path, title, bars, colours=[PLAIN if row["by"] == "lsast" else MUTED for row in shown])
