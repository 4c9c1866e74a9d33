"""`lsast-export parts`: the denoiser's parts, added to a bundle that is there."""

from __future__ import annotations

import json

import click

from lsast_engines.bundle.graph_spec import UNET_SPLIT_GRAPHS

from .console import Phases, common, require_extra


@click.command("parts")
@click.argument("bundle", metavar="BUNDLE")
@click.option("--backend", default="onnxruntime", show_default=True, metavar="NAME", help="Compare with torch on this.")
@common
@click.pass_context
def parts_command(ctx: click.Context, bundle: str, backend: str, as_json: bool) -> None:
    """Add the denoiser's parts to BUNDLE (a folder or a name), for runs that leave some of them out at some steps.

    The parts (ControlNet, whole U-Net, its outermost level) refer into the bundle's weights and are proven against
    torch. Weights, the other graphs and styles stay as they are.
    """
    require_extra()
    from lsast_engines.bundle.bundle import find_bundle

    from ..bundle.add_graphs import add_parts

    phases = Phases()
    written = add_parts(find_bundle(bundle), backend, progress=phases)
    manifest = written.manifest
    facts = {
        "bundle": str(written.path),
        "bytes": sum(manifest.files[f"{name}.onnx"].bytes for name in UNET_SPLIT_GRAPHS),
        "parity": {name: manifest.parity[name] for name in UNET_SPLIT_GRAPHS},
        "seconds": phases.seconds(),
    }
    click.echo(json.dumps(facts) if as_json or ctx.meta.get("lsast.json") else written.path)
