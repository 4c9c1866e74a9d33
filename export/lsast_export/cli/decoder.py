"""`lsast-export decoder`: a smaller decoder, added to a bundle that is there."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lsast_engines.bundle.graph_spec import VAE_DECODER_TINY

from .console import Phases, common, require_extra


@click.command("decoder")
@click.argument("bundle", metavar="BUNDLE")
@click.option(
    "--small",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Folder of a diffusers AutoencoderTiny, such as TAESD's, or its .safetensors alone.",
)
@click.option("--backend", default="onnxruntime", show_default=True, metavar="NAME", help="Compare with torch on this.")
@common
@click.pass_context
def decoder_command(ctx: click.Context, bundle: str, small: Path, backend: str, as_json: bool) -> None:
    """Add the decoder of a tiny autoencoder to BUNDLE (a folder or a name), for `lsast-run --decoder small`.

    It must have been made for the latents of that base: TAESD's is for those of Stable Diffusion 1.x. It is proven
    against torch; weights, the other graphs and styles of the bundle stay as they are.
    """
    require_extra("torch", "diffusers", "onnx", "onnxscript")
    from lsast_engines.bundle.bundle import Bundle, find_bundle

    from ..graphs.small_decoder import WEIGHTS, add_small_decoder, read_small_decoder

    phases = Phases()
    folder = find_bundle(bundle)
    phases("reading the decoder")
    decoder = read_small_decoder(small, Bundle.open(folder, verify_hashes=False).manifest)
    written = add_small_decoder(folder, decoder, backend, progress=phases)
    manifest = written.manifest
    facts = {
        "bundle": str(written.path),
        "bytes": sum(manifest.files[name].bytes for name in (f"{VAE_DECODER_TINY}.onnx", WEIGHTS)),
        "parity": {VAE_DECODER_TINY: manifest.parity[VAE_DECODER_TINY]},
        "seconds": phases.seconds(),
    }
    click.echo(json.dumps(facts) if as_json or ctx.meta.get("lsast.json") else written.path)
