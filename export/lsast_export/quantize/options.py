"""Options of quantization, which the command line shows: without NumPy and onnx, so that it starts at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lsast_engines.bundle.graph_spec import VAE_DECODER, VAE_ENCODER
from lsast_engines.declared_options import Range

OPTIONAL_GRAPHS = (VAE_ENCODER, VAE_DECODER)
"""Graphs that stay in float unless `QuantizeOptions.also` names them."""


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of quantization."""

    images: Path | None = None
    """Folder of pictures to calibrate and to evaluate on; None generates some."""
    pictures: Annotated[int, "Calibrate on N pictures, evaluate on N others.", Range(1)] = 4
    size: Annotated[int, "Side of these pictures in pixels, a multiple of the bundle's.", Range(64, 8192)] = 256
    target: Annotated[
        float, "Least mean PSNR in dB to the pictures of the float graphs; below it nothing is written.", Range(0)
    ] = 30.0
    backend: Annotated[str, "Backend to evaluate on: onnxruntime or openvino."] = "onnxruntime"
    smooth: Annotated[float | None, "SmoothQuant's migration strength alpha, 0 to 1.", Range(0, 1)] = 0.7
    """0 evens out weights, 1 activations (`smoothquant`); None does without. The default was the best for mini when it
    was chosen, and is near the best now (docs/results.md)."""
    also: frozenset[str] = frozenset()
    """Further graphs to quantize, of `OPTIONAL_GRAPHS`. They run once a picture, so they matter in short runs."""
