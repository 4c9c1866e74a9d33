"""`lsast-export parts`: add the denoiser's parts to a bundle."""

from __future__ import annotations

import click

from lsast_engines.bundle.graph_spec import UNET_SPLIT_GRAPHS
from lsast_engines.cli import Command, debug_option, json_option, print_result
from lsast_engines.environment import require_extra

from .shared import PhaseTimer, backend_option


@click.command("parts", cls=Command)
@click.argument("bundle", metavar="BUNDLE")
@backend_option
@json_option
@debug_option
def parts_command(bundle: str, backend: str) -> None:
    """Add the denoiser's parts to BUNDLE (a folder or a name), for runs that skip some of them at some steps.

    The parts (ControlNet, whole U-Net, its outermost level) refer into the bundle's weights and are proven against
    torch. Weights, the other graphs and styles stay as they are.
    """
    require_extra("export", "torch", "diffusers", "onnx", "onnxscript")
    from lsast_engines.bundle.bundle import find_bundle

    from ..bundle.add_graphs import add_parts

    phases = PhaseTimer()
    written = add_parts(find_bundle(bundle), backend, progress=phases)
    manifest = written.manifest
    facts = {
        "bundle": str(written.path),
        "bytes": sum(manifest.files[f"{name}.onnx"].bytes for name in UNET_SPLIT_GRAPHS),
        "parity": {name: manifest.parity[name] for name in UNET_SPLIT_GRAPHS},
        "seconds": phases.seconds(),
    }
    print_result(facts, written.path)
