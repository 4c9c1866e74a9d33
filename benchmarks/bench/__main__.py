"""``python -m benchmarks.bench``: seconds and memory of a picture here, and the fraction of what is possible.

Tables go to stdout, or with ``--json -`` one JSON object; what is being measured goes to stderr. Exit status: 0 done, 1
a configuration could not be measured, 2 wrong usage.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Command, debug_option
from lsast_engines.errors import UsageError, fault_list


@click.command("bench", cls=Command)
@click.option("--bundle", metavar="PATH", help="Folder or name of a bundle. [default: $LSAST_BUNDLE, else mini]")
@click.option("--picture", type=click.Path(exists=True, dir_okay=False), help="What to paint. [default: a pattern]")
@click.option(
    "--backend",
    "backends",
    metavar="NAME[:TYPE]",
    multiple=True,
    help="openvino, openvino:bf16, onnxruntime ...; several times. [default: every one installed, in fp32]",
)
@click.option("--preset", "presets", metavar="NAME", multiple=True, help="Several times: each is measured.")
@click.option(
    "--option", "axes", metavar="NAME=A,B", multiple=True, help="An option of lsast-run; each value is measured."
)
@click.option("--sizes", default="512", show_default=True, help="Sizes of the canvas, such as 512,256,1024.")
@click.option("--batch", "batches", default="1", show_default=True, help="Pictures at once, such as 1,2,4,8.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Of every measurement.")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with. [default: the backend's choice]")
@click.option("--cold", is_flag=True, help="Measure new processes, too, and where their time goes.")
@click.option("--limits/--no-limits", default=True, help="Measure how fast this machine multiplies. [default: yes]")
@click.option("--json", "json_path", metavar="FILE", type=click.Path(), help="Write all figures; - instead of tables.")
@debug_option
def main(
    bundle: str | None,
    picture: str | None,
    backends: tuple[str, ...],
    presets: tuple[str, ...],
    axes: tuple[str, ...],
    sizes: str,
    batches: str,
    repeats: int,
    threads: int | None,
    cold: bool,
    limits: bool,
    json_path: str | None,
) -> None:
    """Measure painting: every backend with every preset and every value of the options.

    The first size and the first batch are what the other sizes and batches are measured besides. Every measurement is
    a process of its own, so that its memory is its own. Run nothing else meanwhile.
    """
    from lsast.images.contact_sheet import parse_axes
    from lsast.options.options import Options
    from lsast_engines.declared_options import option_faults

    from .configurations import parse_counts, plan
    from .report import markdown

    if faults := [fault for preset in presets for fault in option_faults(Options, {"preset": preset})]:
        raise UsageError(fault_list("invalid options:", faults))
    configurations = plan(
        backends or _installed(),
        presets,
        parse_axes(axes),
        parse_counts(sizes, "sizes"),
        parse_counts(batches, "batches"),
    )
    report = _measured(configurations, bundle, picture, repeats, threads, cold=cold, limits=limits)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if json_path and json_path != "-":
        from lsast_engines.files import replace_file

        with replace_file(Path(json_path)) as handle:
            handle.write(text.encode())
    click.echo(text if json_path == "-" else markdown(report))
    if any(row["error"] for row in report["rows"]):
        raise click.exceptions.Exit(1)


def _installed() -> list[str]:
    """The backends that are installed and run on the CPU.

    Raises:
        MissingExtraError: none.
    """
    from lsast_engines.backends.registry import available_backends
    from lsast_engines.errors import MissingExtraError

    found = [name for name, devices in available_backends().items() if "cpu" in devices]
    if not found:
        raise MissingExtraError("onnxruntime", "cpu")
    return found


def _measured(
    configurations: Any,
    bundle: str | None,
    picture: str | None,
    repeats: int,
    threads: int | None,
    *,
    cold: bool,
    limits: bool,
) -> dict[str, Any]:
    """Everything that is measured, ready for JSON."""
    from lsast_engines.bundle.bundle import find_bundle
    from lsast_engines.errors import BackendError

    from .machine import describe, load
    from .measure import add_macs, measure, run_worker, write_test_picture

    def progress(line: str) -> None:
        click.echo(line, err=True)

    report: dict[str, Any] = {
        "machine": describe(),
        "bundle": str(find_bundle(bundle)),
        "threads": threads,
        "repeats": repeats,
        "peak_flops": {},
    }
    rows, notes = [], []
    if limits:
        progress("products of matrices")
        rates = run_worker("peak_flops", {"backends": _installed(), "threads": threads}, threads)
        report["peak_flops"] = rates["gmacs"]
    with tempfile.TemporaryDirectory(prefix="lsast-bench-") as folder:
        for configuration in configurations:
            source = picture or str(Path(folder) / f"{configuration.size}.png")
            if not Path(source).is_file():
                write_test_picture(Path(source), configuration.size)
            task = {"bundle": bundle, "picture": source, "threads": threads, "repeats": repeats}
            rows.append(measure(configuration, task, cold=cold, progress=progress))
    if limits and any(row["warm"] for row in rows):
        try:
            add_macs(rows, report["peak_flops"], threads)
        except BackendError as error:
            notes.append(f"no fractions of the limit: {error}")
    return {**report, "rows": rows, "notes": notes, "load_at_end": load()}


if __name__ == "__main__":
    main()
