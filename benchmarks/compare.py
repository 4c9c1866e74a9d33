"""One picture by lsast and by its peers, on one machine in one run: seconds, memory, and the fraction of the limit.

    python benchmarks/compare.py --bundle mini --size 512 --repeats 5 --json compare.json --chart compare.png
    python benchmarks/compare.py --bundle sd15/fp32 --size 512 --repeats 1 --steps-measured 3

Peers are what `peers.py` has, and those that have no such pipeline are named with the reason. Every row is a process of
its own. `--steps-measured K` takes the time of K steps of a peer instead of all 35 and adds the others at their median;
such rows say so. Bundles of full size with random weights (`sd15_random.py`) cost what real ones cost. Run nothing else
meanwhile.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lsast.bench.machine import PACKAGES, describe, load
from lsast.bench.measure import THREAD_VARIABLES, add_macs, ceiling, child, measure, megabytes, write_test_picture
from lsast.bench.plan import Configuration, Summary, parse_backend
from lsast.bench.report import draw_bars, require_matplotlib, table
from lsast.presets import PRESETS
from lsast_engines.bundle import find_bundle
from lsast_engines.engine import available_backends
from lsast_engines.files import replace_file

Row = dict[str, Any]

REFERENCE = "reference"
"""The peer that the others are compared with."""
OURS = ("released", "exact", "balanced", "fast")
"""Presets that are measured, as far as there are any of these names; `released` computes what the reference does."""


@click.command()
@click.option("--bundle", help="Folder or name of a bundle. [default: $LSAST_BUNDLE, else mini]")
@click.option("--size", default=512, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--steps-measured", type=click.IntRange(3), help="Of a peer, instead of all of its 35.")
@click.option("--threads", type=click.IntRange(1), help="[default: what each takes by itself]")
@click.option(
    "--backend", "backends", multiple=True, default=("onnxruntime", "openvino", "openvino:bf16"), show_default=True
)
@click.option("--preset", "presets", multiple=True, help=f"[default: those of {', '.join(OURS)} that there are]")
@click.option("--peer", "peers", multiple=True, default=(REFERENCE, "diffusers"), show_default=True)
@click.option("--peer-arithmetic", "types", multiple=True, default=("fp32", "bf16"), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw the seconds of a picture as bars, a PNG.")
def main(
    bundle: str | None,
    size: int,
    repeats: int,
    steps_measured: int | None,
    threads: int | None,
    backends: tuple[str, ...],
    presets: tuple[str, ...],
    peers: tuple[str, ...],
    types: tuple[str, ...],
    json_path: Path | None,
    chart: Path | None,
) -> None:
    """Measure one row after another."""
    if chart:
        require_matplotlib()
    folder = str(find_bundle(bundle))
    machine = describe((*PACKAGES, "torch", "diffusers"))
    there = [name for name, devices in available_backends().items() if "cpu" in devices]
    say("products of matrices")
    rates = child("ceilings", {"backends": there, "threads": threads}, threads)["gmacs"]
    task = {"bundle": folder, "size": size, "threads": threads, "repeats": repeats}
    rows = [
        peer_row(name, arithmetic, {**task, "steps_measured": steps_measured}, rates)
        for name in peers
        for arithmetic in types
    ]
    rows += our_rows(backends, presets or [name for name in OURS if name in PRESETS], task, rates)
    report = {
        "machine": machine,
        "bundle": folder,
        "size": size,
        "repeats": repeats,
        "threads": threads,
        "ceilings": rates,
        "rows": rows,
        "not_measured": absent(),
        "load_at_end": load(),
    }
    if json_path:
        with replace_file(json_path) as handle:
            handle.write(json.dumps(report, indent=1, ensure_ascii=False).encode())
    print(markdown(report))
    if chart:
        bars = [(row["name"], row["picture"]["median"], note(row, rows)) for row in rows if not row["error"]]
        title = f"{Path(folder).name}, {size}², {machine['cpu']}, {machine['cores']} cores; median of {repeats}"
        draw_bars(chart, title, bars)


def peer_row(name: str, arithmetic: str, task: Row, rates: dict[str, dict[str, float]]) -> Row:
    """Measure a peer of `peers.py`."""
    label = f"{name} {arithmetic}"
    say(label)
    environment = {} if task["threads"] is None else dict.fromkeys(THREAD_VARIABLES, str(task["threads"]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("peers.py")), name],
        input=json.dumps({**task, "arithmetic": arithmetic}),
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
    )
    row: Row = {"name": label, "by": name, "arithmetic": arithmetic, "preset": None, "extrapolated": None}
    if done.returncode:
        return {**row, "error": f"ended with status {done.returncode}; see above"}
    found = json.loads(done.stdout)
    measured, total = found["counted_steps"], found["run_steps"]
    pictures, steps = whole(found["pictures"], found["steps"], measured, total)
    best = ceiling(rates, arithmetic)
    return {
        **row,
        "picture": pictures.as_json(),
        "step": steps.as_json(),
        "steps": total,
        "extrapolated": measured if measured < total else None,
        "gmac": found["macs_picture"] / 1e9,
        "gmac_step": found["macs_step"] / 1e9,
        "fraction": best and found["macs_picture"] / 1e9 / pictures.median / best,
        "step_fraction": best and found["macs_step"] / 1e9 / steps.median / best,
        "peak_mb": megabytes(found["peak_bytes"]),
        "error": None,
    }


def whole(
    pictures: Sequence[float], steps: Sequence[Sequence[float]], measured: int, total: int
) -> tuple[Summary, Summary]:
    """Seconds of whole pictures and of steps, of pictures that were painted with `measured` steps of `total`."""
    every = Summary.of([seconds for run in steps for seconds in run])
    return Summary.of([seconds + (total - measured) * every.median for seconds in pictures]), every


def our_rows(
    backends: Sequence[str], presets: Sequence[str], task: Row, rates: dict[str, dict[str, float]]
) -> list[Row]:
    """Measure ours: every backend with every preset."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "picture.png"
        write_test_picture(picture, task["size"])
        for backend, arithmetic in map(parse_backend, backends):
            for preset in presets:
                chosen = Configuration(backend=backend, arithmetic=arithmetic, preset=preset, size=task["size"])
                found.append(measure(chosen, {**task, "picture": str(picture)}, cold=False, progress=say))
    add_macs(found, rates, task["threads"])
    rows = []
    for row in found:
        label = f"lsast {row['preset']}, {row['backend']} {row['arithmetic']}"
        head = {"name": label, "by": "lsast", "arithmetic": row["arithmetic"], "preset": row["preset"]}
        if row["error"]:
            rows.append({**head, "extrapolated": None, "error": row["error"]})
            continue
        warm = row["warm"]
        steps = warm["step"]["n"] // task["repeats"]
        once = {"encoder", "hint"} | {name for name in warm["graphs"] if name.startswith("decoder")}
        inner = [graph for name, graph in warm["graphs"].items() if name not in once]
        gmac_step = sum(g["gmac"] * sum(group["runs"] for group in g["shapes"]) for g in inner) / steps
        best = ceiling(rates, warm["limit"])
        rows.append(
            {
                **head,
                "picture": warm["picture"],
                "step": warm["step"],
                "steps": steps,
                "extrapolated": None,
                "gmac": warm["gmac"],
                "gmac_step": gmac_step,
                "fraction": warm["fraction"],
                "step_fraction": best and gmac_step / warm["step"]["median"] / best,
                "peak_mb": warm["peak_mb"],
                "error": None,
                "figures": warm,
            }
        )
    return rows


def absent() -> dict[str, str]:
    """Peers that cannot be measured here, and why."""
    reasons = {}
    for package, module, newest in (
        ("optimum-intel", "optimum.intel", "2.2.0"),
        ("optimum-onnx", "optimum.onnxruntime", "0.1.0"),
    ):
        try:
            names = dir(importlib.import_module(module))
        except ImportError:
            reasons[package] = f"not installed; {newest}, the newest looked at, has no pipeline with a ControlNet"
            continue
        if not any("ControlNet" in name for name in names):
            reasons[package] = "has no pipeline with a ControlNet"
    try:
        importlib.import_module("stable_diffusion_cpp")
        reasons["stable-diffusion.cpp"] = "takes checkpoints in one file with a text encoder, which bundles have not"
    except ImportError:
        reasons["stable-diffusion.cpp"] = "stable-diffusion-cpp-python is not installed"
    return reasons


def markdown(report: Row) -> str:
    """The table of all rows."""
    rows = report["rows"]
    machine = report["machine"]
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["name"], row["error"], *[""] * 6))
            continue
        star = "" if row["extrapolated"] is None else f", from {row['extrapolated']} steps"
        lines.append(
            (
                row["name"],
                f"{row['picture']['median']:.3g} ({row['picture']['spread']:.2g}){star}",
                ratio(row, base(rows, "fp32"), "picture"),
                f"{row['steps']} of {row['step']['median']:.3g} ({row['step']['spread']:.2g})",
                ratio(row, base(rows, row["arithmetic"]), "step"),
                f"{row['gmac']:.0f}",
                "-" if row["step_fraction"] is None else f"{row['step_fraction']:.0%}",
                "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
            )
        )
    heads = (
        "",
        "picture s (spread)",
        "of the reference fp32",
        "steps s (spread)",
        "step: of the reference in its type",
    )
    heads += ("GMAC", "step: of the limit", "peak MB")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    limits = ", ".join(f"{name} {max(by.values()):.0f}" for name, by in report["ceilings"].items())
    return "\n\n".join(
        [
            f"{Path(report['bundle']).name} at {report['size']}², n = {report['repeats']}; {machine['cpu']}, "
            f"{machine['cores']} cores; {versions}; load {machine['load']} … {report['load_at_end']}",
            f"The limit, 10⁹ multiply-accumulates a second: {limits}",
            table(heads, lines),
            "Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in report["not_measured"].items()),
        ]
    )


def base(rows: Sequence[Row], arithmetic: str) -> Row | None:
    """The reference in an arithmetic, if it was measured."""
    found = [row for row in rows if row["by"] == REFERENCE and row["arithmetic"] == arithmetic and not row["error"]]
    return found[0] if found else None


def ratio(row: Row, reference: Row | None, what: str) -> str:
    """How many times as fast as the reference."""
    return "-" if reference is None else f"{reference[what]['median'] / row[what]['median']:.2f} x"


def note(row: Row, rows: Sequence[Row]) -> str:
    """What stands at the end of a bar."""
    measured = "" if row["extrapolated"] is None else f", from {row['extrapolated']} steps"
    return f"{row['picture']['median']:.3g} s, {ratio(row, base(rows, 'fp32'), 'picture')}{measured}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
