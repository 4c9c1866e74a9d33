"""One picture by lsast and by its peers, on one machine in one run: seconds, memory, and the fraction of the limit.

    python -m benchmarks.speed.compare --bundle mini --size 512 --repeats 5 --json compare.json --chart compare.png
    python -m benchmarks.speed.compare --bundle sd15/fp32 --size 512 --repeats 1 --steps-measured 3 \
        --row "fast, int8: bundle=sd15/int8, preset=fast, guidance=1, decoder=small"
    python -m benchmarks.speed.compare --from-json compare.json --chart compare.png --bar reference --bar onnxruntime

Ours are the presets on the bundle, and every `--row`: a bundle, a backend, a preset and options of its own. Peers are
what `peers.py` has, and `stable-diffusion.cpp` (`peer_sdcpp.py`); those that have no such pipeline are named with the
reason. Every row is a process of its own, and is in the JSON as soon as it is measured. `--steps-measured K` takes the
time of K steps of a peer instead of all 35 and adds the others at their median; such rows say so. Bundles of full size
with random weights (`sd15_random.py`) cost what real ones cost. Run nothing else meanwhile.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.bench.configurations import Configuration, Summary, parse_backend
from benchmarks.bench.machine import PACKAGES, describe, load
from benchmarks.bench.measure import (
    THREAD_VARIABLES,
    add_macs,
    best_rate,
    measure,
    megabytes,
    run_worker,
    write_test_picture,
)
from benchmarks.speed.compare_report import REFERENCE, chart, markdown
from lsast.images.contact_sheet import parse_axes
from lsast_engines.backends.registry import available_backends
from lsast_engines.bundle.bundle import find_bundle
from lsast_engines.errors import LsastError, UsageError
from lsast_engines.files import replace_file

Row = dict[str, Any]
Rates = dict[str, dict[str, float]]

SDCPP = "stable-diffusion.cpp"
"""The peer that has a script of its own."""

PEERS = {
    REFERENCE: ("fp32", "bf16"),
    "torch.compile": ("fp32", "bf16"),
    "diffusers": ("fp32", "bf16"),
    SDCPP: ("fp16", "q8_0"),
}
"""The compute dtypes of every peer, those of the last the types of its weights."""


OURS = ("released", "exact", "balanced", "fast")
"""Presets that are measured, the first in float32 alone: it computes what the reference does."""


@dataclass(frozen=True)
class Own:
    """A row of ours."""

    name: str
    bundle: str
    configuration: Configuration

    @classmethod
    def parse(cls, text: str, bundle: str, size: int) -> Own:
        """A row of a text ``NAME: key=value, …``: `bundle`, `backend` (NAME[:TYPE]), `preset`, and options.

        Raises:
            UsageError: a text that is no row.
        """
        name, colon, rest = text.partition(":")
        pairs = [part.strip().partition("=") for part in rest.split(",")]
        if not (colon and name.strip() and all(equals for _, equals, _ in pairs)):
            raise UsageError(f"found the row {text!r}; expected NAME: key=value, key=value")
        given = {key.strip(): value.strip() for key, _, value in pairs}
        bundle = str(find_bundle(given.pop("bundle", bundle)))
        backend, compute_dtype = parse_backend(given.pop("backend", "onnxruntime"))
        preset = given.pop("preset", None)
        options = {key: value for key, (value,) in parse_axes([f"{k}={v}" for k, v in given.items()]).items()}
        chosen = Configuration(backend=backend, compute_dtype=compute_dtype, preset=preset, options=options, size=size)
        return cls(name.strip(), bundle, chosen)


def rows_of_ours(
    bundle: str, size: int, backends: Sequence[str], presets: Sequence[str], texts: Sequence[str]
) -> list[Own]:
    """Every backend with every preset, then those of `texts`."""
    ours = []
    for backend, compute_dtype in map(parse_backend, backends):
        name = backend if backend == "auto" else f"{backend} {compute_dtype}"
        for preset in presets or (OURS if name == "onnxruntime fp32" else OURS[1:]):
            how = Configuration(backend=backend, compute_dtype=compute_dtype, preset=preset, size=size)
            ours.append(Own(f"{preset}, {name}", bundle, how))
    return ours + [Own.parse(text, bundle, size) for text in texts]


@click.command()
@click.option("--bundle", help="Folder or name of a bundle. [default: $LSAST_BUNDLE, else mini]")
@click.option("--size", default=512, show_default=True)
@click.option("--repeats", type=click.IntRange(0), default=3, show_default=True, help="0: ours without warming up.")
@click.option("--steps-measured", type=click.IntRange(3), help="Of a peer, instead of all of its 35.")
@click.option("--threads", type=click.IntRange(1), help="[default: what each takes by itself]")
@click.option(
    "--backend", "backends", metavar="NAME[:TYPE]", multiple=True, default=("onnxruntime", "auto"), show_default=True
)
@click.option("--preset", "presets", multiple=True, help=f"[default: {', '.join(OURS)}]")
@click.option("--row", "texts", metavar="NAME: KEY=VALUE,…", multiple=True, help="A row besides; see above.")
@click.option("--only-rows", is_flag=True, help="Neither peers nor presets: the --row alone.")
@click.option(
    "--peer",
    "peers",
    metavar="NAME[:TYPE,TYPE]",
    multiple=True,
    help=f"With its compute dtypes, such as {REFERENCE}:fp32. [default: {', '.join(PEERS)}]",
)
@click.option("--base", type=click.Path(exists=True), help=f"What {SDCPP} reads: a base in diffusers' format.")
@click.option("--controlnet", type=click.Path(exists=True), help="Its ControlNet, in diffusers' format.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@click.option("--from-json", type=click.Path(exists=True, path_type=Path), help="Measure nothing: show these figures.")
@click.option("--chart", "chart_path", type=click.Path(path_type=Path), help="Draw the seconds of a picture, a PNG.")
@click.option("--title", help="Over the chart. [default: bundle, size and machine]")
@click.option("--bar", "only", multiple=True, help="Draw only rows whose name has this text; several times.")
def main(
    bundle: str | None,
    size: int,
    repeats: int,
    steps_measured: int | None,
    threads: int | None,
    backends: tuple[str, ...],
    presets: tuple[str, ...],
    texts: tuple[str, ...],
    only_rows: bool,
    peers: tuple[str, ...],
    base: str | None,
    controlnet: str | None,
    json_path: Path | None,
    from_json: Path | None,
    chart_path: Path | None,
    title: str | None,
    only: tuple[str, ...],
) -> None:
    """Measure one row after another."""
    if chart_path:
        import matplotlib  # noqa: F401 - not only after hours of measuring
    if from_json:
        report = json.loads(from_json.read_text())
    else:
        asked = [(name, kind) for text in peers or PEERS for name, kind in parse_peer(text)]
        if not (base and controlnet):
            if any(name == SDCPP for name, _ in asked) and peers:
                raise click.UsageError(f"{SDCPP} needs its weights: give --base and --controlnet")
            asked = [(name, kind) for name, kind in asked if name != SDCPP]
        try:
            folder = str(find_bundle(bundle))
            ours = rows_of_ours(folder, size, () if only_rows else backends, presets, texts)
        except LsastError as error:
            raise click.ClickException(str(error)) from error
        task = {"bundle": folder, "size": size, "threads": threads, "repeats": repeats}
        there = {**task, "steps_measured": steps_measured, "base": base, "controlnet": controlnet}
        there["repeats"] = max(1, repeats)
        report = measured(ours, [] if only_rows else asked, task, there, json_path)
    print(markdown(report))
    if chart_path:
        chart(report, chart_path, only, title)


def measured(
    ours: Sequence[Own], peers: Sequence[tuple[str, str]], task: Row, peer_task: Row, path: Path | None
) -> Row:
    """Measure all rows; those that are done are in the file `path` at any time."""
    machine = describe((*PACKAGES, "torch", "diffusers", "stable-diffusion-cpp-python"))
    there = [name for name, devices in available_backends().items() if "cpu" in devices]
    say("products of matrices")
    rates = run_worker("peak_flops", {"backends": there, "threads": task["threads"]}, task["threads"])["gmacs"]
    rows: list[Row] = []
    report = {"machine": machine, **task, "peak_flops": rates, "rows": rows}
    report["not_measured"] = absent({name for name, _ in peers})

    def all_rows() -> Iterator[Row]:
        yield from (peer_row(name, compute_dtype, peer_task, rates) for name, compute_dtype in peers)
        with tempfile.TemporaryDirectory() as scratch:
            picture = Path(scratch) / "picture.png"
            write_test_picture(picture, task["size"])
            yield from (our_row(own, {**task, "picture": str(picture)}, rates) for own in ours)

    for row in all_rows():
        rows.append(row)
        report["load_at_end"] = load()
        if path:
            with replace_file(path) as handle:
                handle.write(json.dumps(report, indent=1, ensure_ascii=False).encode())
    return report


def peer_row(name: str, compute_dtype: str, task: Row, rates: Rates) -> Row:
    """Measure a peer."""
    label = f"{name} {compute_dtype}"
    say(label)
    row: Row = {"name": label, "by": name, "compute_dtype": compute_dtype, "preset": None, "extrapolated": None}
    if name == SDCPP and importlib.util.find_spec("stable_diffusion_cpp") is None:
        return {**row, "error": "stable-diffusion-cpp-python is not installed"}
    environment = {} if task["threads"] is None else dict.fromkeys(THREAD_VARIABLES, str(task["threads"]))
    module = "benchmarks.speed." + ("peer_sdcpp" if name == SDCPP else "peers")
    done = subprocess.run(
        [sys.executable, "-m", module, name],
        input=json.dumps({**task, "compute_dtype": compute_dtype}),
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
    )
    if done.returncode:
        return {**row, "error": f"ended with status {done.returncode}; see above"}
    found = json.loads(done.stdout)
    measured, total = found["counted_steps"], found["run_steps"]
    pictures, steps = whole(found["pictures"], found["steps"], measured, total)
    best = best_rate(rates, compute_dtype)
    gmac, gmac_step = (found[key] and found[key] / 1e9 for key in ("macs_picture", "macs_step"))
    return {
        **row,
        "picture": pictures.as_json(),
        "step": steps.as_json(),
        "steps": total,
        "extrapolated": measured if measured < total else None,
        "gmac": gmac,
        "gmac_step": gmac_step,
        "fraction": best and gmac and gmac / pictures.median / best,
        "step_fraction": best and gmac_step and gmac_step / steps.median / best,
        "peak_mb": megabytes(found["peak_bytes"]),
        "error": None,
    }


def whole(
    pictures: Sequence[float], steps: Sequence[Sequence[float]], measured: int, total: int
) -> tuple[Summary, Summary]:
    """Seconds of whole pictures and of steps, of pictures that were painted with `measured` steps of `total`."""
    every = Summary.of([seconds for run in steps for seconds in run])
    return Summary.of([seconds + (total - measured) * every.median for seconds in pictures]), every


def our_row(own: Own, task: Row, rates: Rates) -> Row:
    """Measure one of ours."""
    row = measure(own.configuration, {**task, "bundle": own.bundle}, cold=False, progress=say)
    head = {"name": f"lsast {own.name}", "by": "lsast", "compute_dtype": row["compute_dtype"], "preset": row["preset"]}
    head |= {"bundle": own.bundle, "options": row["options"], "extrapolated": None, "error": row["error"]}
    if row["error"]:
        return head
    add_macs([row], rates, task["threads"])
    warm = row["warm"]
    if row["backend"] == "auto":
        head["compute_dtype"] = warm["choice"]["compute_dtype"]
        head["name"] += f" ({warm['choice']['backend']} {head['compute_dtype']})"
    steps = warm["step"]["n"] // max(1, task["repeats"])
    once = {"vae_encoder", "controlnet_cond"} | {name for name in warm["graphs"] if name.startswith("vae_decoder")}
    inner = [graph for name, graph in warm["graphs"].items() if name not in once]
    gmac_step = sum(g["gmac"] * sum(group["runs"] for group in g["shapes"]) for g in inner) / steps
    best = best_rate(rates, warm["limit"])
    return {
        **head,
        "picture": warm["picture"],
        "step": warm["step"],
        "steps": steps,
        "gmac": warm["gmac"],
        "gmac_step": gmac_step,
        "fraction": warm["fraction"],
        "step_fraction": best and gmac_step / warm["step"]["median"] / best,
        "peak_mb": warm["peak_mb"],
        "figures": warm,
    }


def absent(asked: set[str]) -> dict[str, str]:
    """Peers that are not measured here, and why."""
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
    if SDCPP not in asked:
        reasons[SDCPP] = "without --base and --controlnet; it takes the shape of Stable Diffusion alone, not mini's"
    return reasons


def parse_peer(text: str) -> list[tuple[str, str]]:
    """A peer with each of its compute dtypes, of a text such as ``reference`` or ``reference:fp32``."""
    name, _, types = text.partition(":")
    if name not in PEERS:
        raise click.UsageError(f"found the peer {name!r}; expected one of {', '.join(PEERS)}")
    return [(name, kind) for kind in types.split(",") if kind] or [(name, kind) for kind in PEERS[name]]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
