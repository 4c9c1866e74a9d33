"""`lsast-export check`: verify a bundle on this machine."""

from __future__ import annotations

import click

from lsast_engines.cli import Command, debug_option, echo, fail, json_option, print_result

from .shared import EXTRA, PhaseTimer


@click.command("check", cls=Command, requires=EXTRA)
@click.argument("bundle", metavar="BUNDLE")
@click.option("--backend", default="auto", metavar="NAME", help="onnxruntime, openvino or auto. [default: auto]")
@click.option("--device", default="auto", metavar="NAME", help="cpu, cuda ... [default: auto]")
@json_option
@debug_option
def check_command(bundle: str, backend: str, device: str) -> None:
    """Verify BUNDLE (a folder or a name): hashes, graphs, styles, and parity with torch on this machine."""
    from lsast_engines.bundle.bundle import find_bundle

    from ..bundle.check import check_bundle

    phases = PhaseTimer()
    report = check_bundle(find_bundle(bundle), backend, device, progress=phases)
    for name, error in report.figures.items():
        recorded = report.recorded.get(name)
        at_export = "" if recorded is None else f" (at export {recorded:.1e})"
        verdict = "" if error <= report.tolerance else f": past the tolerance of {report.tolerance:.0e}"
        echo(f"           {name}: relative error {error:.1e}{at_export}{verdict}", err=True)
    auto = {}
    if report.auto is not None:
        auto = {"backend": report.auto.backend, "compute_dtype": report.auto.compute_dtype, "psnr": report.auto_psnr}
        echo(
            f"           auto: {report.auto.backend} in {report.auto.compute_dtype}, {report.auto_psnr:.1f} dB to fp32 "
            f"(expected {report.auto_expected:.3g})",
            err=True,
        )
    facts = {
        "bundle": str(report.bundle),
        "passed": report.passed,
        "backend": report.backend,
        "parity": report.figures,
        "auto": auto,
        "recorded": report.recorded,
        "tolerance": report.tolerance,
        "styles": list(report.styles),
        "seconds": phases.seconds(),
    }
    print_result(facts, report.bundle)
    if not report.passed:
        fail(f"{report.bundle} does not compute what torch computes here; export it again, or use another backend", 1)
