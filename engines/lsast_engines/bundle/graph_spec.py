"""The inputs and outputs of a bundle's graphs: the only place where their names are written.

All are float32, also where weights are stored in 16 bits, except the timestep. An axis that is a string is dynamic; the
same string means the same length in all inputs of one call.

====== =====================================================
B      pictures in the batch
G      guidance: 1 = conditional only; 2 = [unconditional, conditional]
H, W   picture height and width in pixels
h, w   latent height and width: H / factor, W / factor
h2, w2 h / 2, w / 2, and so on: the deeper levels of a network
====== =====================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

VAE_ENCODER, CONTROLNET_COND, DENOISER, VAE_DECODER = "vae_encoder", "controlnet_cond", "denoiser", "vae_decoder"
REQUIRED_GRAPHS = (VAE_ENCODER, CONTROLNET_COND, DENOISER, VAE_DECODER)
"""The graphs of every bundle."""

CONTROLNET, UNET_FULL, UNET_OUTER = "controlnet", "unet_full", "unet_outer"
UNET_SPLIT_GRAPHS = (CONTROLNET, UNET_FULL, UNET_OUTER)
"""The split graphs, which a bundle may have beside the denoiser: all three or none."""

VAE_DECODER_TINY = "vae_decoder_tiny"
"""A smaller decoder with the inputs and outputs of `VAE_DECODER`, which a bundle may have beside it."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: Annotated[str, "float32|int64"]
    """NumPy's name of the type."""
    shape: tuple[int | str, ...]
    """Axis lengths; a string names a dynamic axis; empty for a scalar."""

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of a graph, in the order of the exported file."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The widths of a base that determine the shapes of its graphs."""

    hint_channels: int
    """Channels of the ControlNet's hint features."""
    tokens: int
    """Tokens T of a context."""
    unet_width: int
    """Columns Wu of packed keys and values of all cross-attentions of the U-Net."""
    control_width: int
    """Columns Wc of packed keys and values of all cross-attentions of the ControlNet."""
    latent_channels: int = 4
    factor: int = 8
    """Pixels along a side of one latent cell."""


def graph_specs(geometry: Geometry) -> dict[str, GraphSpec]:
    """The specs of the four graphs of a base of this geometry, by graph name.

    - ``vae_encoder``: picture in [-1, 1] → mean and standard deviation of its latent, before `latent_scale`.
    - ``controlnet_cond``: edges in {0, 1} → the ControlNet's hint features, constant over the denoising loop.
    - ``denoiser``: latent and hint features at a timestep → the predicted noise eps, also of a v-prediction base. The
      ControlNet runs once, at batch B, with the style's keys and values; both guidance rows share its residuals.
    - ``vae_decoder``: latent, divided by `latent_scale` → picture in about [-1, 1].
    """
    g = _Tensors(geometry)
    specs = (
        GraphSpec(VAE_ENCODER, (g.image,), (replace(g.latent, name="mean"), replace(g.latent, name="std"))),
        GraphSpec(CONTROLNET_COND, (replace(g.image, name="edges"),), (g.hint,)),
        GraphSpec(DENOISER, (g.latent, g.hint, g.timestep, g.kv_unet, g.kv_control, g.control_scale), (g.eps,)),
        GraphSpec(VAE_DECODER, (g.latent,), (g.image,)),
    )
    return {spec.name: spec for spec in specs}


def tiny_decoder_spec(geometry: Geometry) -> GraphSpec:
    """The spec of `VAE_DECODER_TINY`; its latents are divided by `latent_scale` too, whatever its network expects."""
    return replace(graph_specs(geometry)[VAE_DECODER], name=VAE_DECODER_TINY)


@dataclass(frozen=True, kw_only=True)
class UnetSplit:
    """How a denoiser is split: between ControlNet and U-Net, and the U-Net below its outermost level.

    The outermost level, at full latent resolution, is the first convolution, the first down block, the last up block
    and the last convolution; it takes a cached feature of the levels below (DeepCache, arXiv 2312.00858).
    """

    residuals: tuple[tuple[int, int], ...]
    """Channels and level of each of the ControlNet's residuals, in its order, the middle block's last. At level n the
    sides are those of the latent, halved n times."""
    outer: int
    """Number of residuals, from the first, of the outermost level."""
    feature: int
    """Channels of the cached feature."""


def split_specs(geometry: Geometry, cut: UnetSplit) -> dict[str, GraphSpec]:
    """The specs of the split graphs, by graph name.

    - ``controlnet``: the ControlNet at batch B, with the style's keys and values → its residuals, scaled.
    - ``unet_full``: the U-Net with these residuals → eps, and the `feature` that enters its outermost level.
    - ``unet_outer``: the outermost level, with its residuals and a `feature` of an earlier step → eps.

    ``controlnet`` and ``unet_full`` together compute the ``denoiser``; ``unet_outer`` with the feature of the same step
    computes the same eps.
    """
    g = _Tensors(geometry)
    sides = [("h", "w") if level == 0 else (f"h{2**level}", f"w{2**level}") for _, level in cut.residuals]
    residuals = tuple(
        TensorSpec(f"residual_{place}", "float32", ("B", channels, *sides[place]))
        for place, (channels, _) in enumerate(cut.residuals)
    )
    feature = TensorSpec("feature", "float32", ("G", "B", cut.feature, "h", "w"))
    unet = (g.latent, g.timestep, g.kv_unet)
    specs = (
        GraphSpec(CONTROLNET, (g.latent, g.hint, g.timestep, g.kv_control, g.control_scale), residuals),
        GraphSpec(UNET_FULL, (*unet, *residuals), (g.eps, feature)),
        GraphSpec(UNET_OUTER, (*unet, *residuals[: cut.outer], feature), (g.eps,)),
    )
    return {spec.name: spec for spec in specs}


class _Tensors:
    def __init__(self, g: Geometry) -> None:
        self.image = TensorSpec("image", "float32", ("B", 3, "H", "W"))
        self.latent = TensorSpec("latent", "float32", ("B", g.latent_channels, "h", "w"))
        self.hint = TensorSpec("hint", "float32", ("B", g.hint_channels, "h", "w"))
        self.timestep = TensorSpec("timestep", "int64", ("B",))
        self.kv_unet = TensorSpec("kv_unet", "float32", ("G", "B", g.tokens, g.unet_width))
        self.kv_control = TensorSpec("kv_control", "float32", ("B", g.tokens, g.control_width))
        self.control_scale = TensorSpec("control_scale", "float32", ())
        self.eps = TensorSpec("eps", "float32", ("G", *self.latent.shape))


def optional_specs(geometry: Geometry, graphs: Mapping[str, GraphSpec]) -> dict[str, GraphSpec]:
    """The specs that the optional ones of `graphs` should have, read from the shapes of `graphs`; if one of the split
    graphs is there, of all three."""
    small = {VAE_DECODER_TINY: tiny_decoder_spec(geometry)} if VAE_DECODER_TINY in graphs else {}
    if not any(name in graphs for name in UNET_SPLIT_GRAPHS):
        return small
    try:
        cut = UnetSplit(
            residuals=tuple(
                (int(t.shape[1]), downsampling_level(str(t.shape[-1]))) for t in graphs[CONTROLNET].outputs
            ),
            # All inputs but latent, timestep, kv_unet and feature are residuals.
            outer=len(graphs[UNET_OUTER].inputs) - 4,
            feature=int(graphs[UNET_FULL].outputs[1].shape[2]),
        )
    except (LookupError, ValueError):  # a graph, an output or an axis is missing, or an axis has no length
        cut = UnetSplit(residuals=(), outer=0, feature=0)
    return {**split_specs(geometry, cut), **small}


def downsampling_level(axis: str) -> int:
    """The level of an axis ``h…`` or ``w…``: 0 for ``h``, 1 for ``h2``, 2 for ``h4``."""
    return int(axis[1:]).bit_length() - 1 if axis[1:].isdecimal() else 0
