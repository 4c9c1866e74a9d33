"""A small denoiser for the fake GPU: inputs, what it computes of them, by hand."""

from __future__ import annotations

import numpy as np

from fake_gpu import Kernel
from lsast_engines.backends.tensorrt.shape_profile import Range, ShapeRanges
from lsast_engines.bundle.graph_spec import DENOISER, Geometry, graph_specs

SPEC = graph_specs(Geometry(hint_channels=2, tokens=3, unet_width=6, control_width=4))[DENOISER]
RANGES = ShapeRanges(Range(64, 64, 128), Range(1, 1, 3))


def step(feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What the fake's kernel computes of the denoiser's inputs: every input counts, every picture for itself."""
    picture = feeds["latent"] + feeds["hint"].mean(1, keepdims=True) * feeds["control_scale"]
    picture = picture + (feeds["timestep"] / 1000 + feeds["kv_control"].sum((1, 2)))[:, None, None, None]
    return np.asarray(picture[None] * feeds["kv_unet"].mean((2, 3))[:, :, None, None, None], np.float32)


def kernels() -> dict[str, Kernel]:
    """What the engines of the fake library compute."""
    denoiser = Kernel(
        SPEC,
        lambda feeds: {"eps": step(feeds)},
        lambda shapes: {"eps": (*shapes["kv_unet"][:2], *shapes["latent"][1:])},
    )
    return {DENOISER: denoiser}


def inputs(batch: int = 2, rows: int = 2, height: int = 8, width: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the denoiser."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return {
        "latent": normal(batch, 4, height, width),
        "hint": normal(batch, 2, height, width),
        "timestep": rng.integers(0, 1000, batch),
        "kv_unet": normal(rows, batch, 3, 6),
        "kv_control": normal(batch, 3, 4),
        "control_scale": np.asarray(0.7, np.float32),
    }
