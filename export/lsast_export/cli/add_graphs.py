"""`lsast-export parts` and `lsast-export decoder`: add graphs to a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lsast_engines.bundle.graph_spec import UNET_SPLIT_GRAPHS, VAE_DECODER_TINY
from lsast_engines.cli import Command, debug_option, json_option, print_result

from .shared import EXTRA, PhaseTimer

if TYPE_CHECKING:
    from lsast_engines.bundle.bundle import Bundle

_backend_option = click.option(
    "--backend", default="onnxruntime", show_default=True, metavar="NAME", help="Backend to compare with torch on."
)


@click.command("parts", cls=Command, requires=EXTRA)
@click.argument("bundle", metavar="BUNDLE")
@_backend_option
@json_option
@debug_option
def parts_command(bundle: str, backend: str) -> None:
    """Add the denoiser's parts to BUNDLE (a folder or a name), for runs that skip some of them at some steps.

    The parts (ControlNet, whole U-Net, its outermost level) refer into the bundle's weights and are proven against
    torch. Weights, the other graphs and styles stay as they are.
    """
    from lsast_engines.bundle.bundle import find_bundle

    from ..bundle.add_graphs import add_parts

    phases = PhaseTimer()
    written = add_parts(find_bundle(bundle), backend, progress=phases)
    _print(written, UNET_SPLIT_GRAPHS, [f"{name}.onnx" for name in UNET_SPLIT_GRAPHS], phases)


@click.command("decoder", cls=Command, requires=EXTRA)
@click.argument("bundle", metavar="BUNDLE")
@click.option(
    "--small",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Folder of a diffusers AutoencoderTiny, such as TAESD's, or its .safetensors alone.",
)
@_backend_option
@json_option
@debug_option
def decoder_command(bundle: str, small: Path, backend: str) -> None:
    """Add the decoder of a tiny autoencoder to BUNDLE (a folder or a name), for `lsast-run --decoder small`.

    It must have been made for the latents of that base: TAESD's is for those of Stable Diffusion 1.x. It is proven
    against torch; weights, the other graphs and styles of the bundle stay as they are.
    """
    from lsast_engines.bundle.bundle import Bundle, find_bundle

    from ..bundle.add_graphs import add_small_decoder
    from ..graphs.small_decoder import WEIGHTS, read_small_decoder

    phases = PhaseTimer()
    folder = find_bundle(bundle)
    phases("reading the decoder")
    decoder = read_small_decoder(small, Bundle.open(folder, verify_hashes=False).manifest)
    written = add_small_decoder(folder, decoder, backend, progress=phases)
    _print(written, [VAE_DECODER_TINY], [f"{VAE_DECODER_TINY}.onnx", WEIGHTS], phases)


def _print(written: Bundle, graphs: Sequence[str], files: Sequence[str], phases: PhaseTimer) -> None:
    """Print what was added to a bundle."""
    manifest = written.manifest
    facts = {
        "bundle": str(written.path),
        "bytes": sum(manifest.files[name].bytes for name in files),
        "parity": {name: manifest.parity[name] for name in graphs},
        "seconds": phases.seconds(),
    }
    print_result(facts, written.path)
