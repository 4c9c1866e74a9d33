"""`lsast-export decoder`: add a smaller decoder to a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from lsast_engines.bundle.graph_spec import VAE_DECODER_TINY
from lsast_engines.cli import Command, debug_option, json_option, print_result
from lsast_engines.environment import require_extra

from .shared import PhaseTimer, backend_option


@click.command("decoder", cls=Command)
@click.argument("bundle", metavar="BUNDLE")
@click.option(
    "--small",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Folder of a diffusers AutoencoderTiny, such as TAESD's, or its .safetensors alone.",
)
@backend_option
@json_option
@debug_option
def decoder_command(bundle: str, small: Path, backend: str) -> None:
    """Add the decoder of a tiny autoencoder to BUNDLE (a folder or a name), for `lsast-run --decoder small`.

    It must have been made for the latents of that base: TAESD's is for those of Stable Diffusion 1.x. It is proven
    against torch; weights, the other graphs and styles of the bundle stay as they are.
    """
    require_extra("export", "torch", "diffusers", "onnx", "onnxscript")
    from lsast_engines.bundle.bundle import Bundle, find_bundle

    from ..bundle.add_graphs import add_small_decoder
    from ..graphs.small_decoder import WEIGHTS, read_small_decoder

    phases = PhaseTimer()
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
    print_result(facts, written.path)
