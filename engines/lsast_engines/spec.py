"""What the graphs of a bundle take and give: the one place where their input and output names are written.

Everything is float32 at the border (weights inside may be fp16), but for the timestep. An axis that is a string is
dynamic; the same string means the same length in every input of one call.

==== =====================================================
B    pictures in the batch
G    guidance: 1 = conditional only; 2 = [unconditional, conditional]
H, W picture height and width in pixels
h, w latent height and width: H / factor, W / factor
==== =====================================================
"""

from __future__ import annotations

from dataclasses import dataclass

ENCODER, HINT, DENOISER, DECODER = "encoder", "hint", "denoiser", "decoder"
"""Names of the four graphs."""
ADVANCE = "advance"
"""Name of the graph that takes a solver's step on the device; no bundle's, see `advance_spec`."""
KEPT = 3
"""Latents that a solver may keep of earlier steps, on the device."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: str
    """NumPy's name of the element type, e.g. ``float32``."""
    shape: tuple[int | str, ...]
    """Axis lengths; a string names a dynamic axis; empty for a scalar."""

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class GraphSpec:
    """Name, inputs and outputs of a graph, in the order of the exported file."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The widths of a base, from which the shapes of its graphs follow."""

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

    - ``encoder``: picture in [-1, 1] → mean and standard deviation of its latent, before `latent_scale`.
    - ``hint``: edges in {0, 1} → the ControlNet's hint features, constant over the denoising loop.
    - ``denoiser``: one step. Always gives the noise eps: a v-prediction base is converted inside. The ControlNet runs
      once, at batch B, with the style's keys and values; both guidance halves share its residuals.
    - ``decoder``: latent, divided by `latent_scale` → picture in about [-1, 1].
    """
    g = geometry
    picture = ("B", 3, "H", "W")
    latent = ("B", g.latent_channels, "h", "w")
    hint = TensorSpec("hint", "float32", ("B", g.hint_channels, "h", "w"))
    specs = (
        GraphSpec(
            ENCODER,
            (TensorSpec("image", "float32", picture),),
            (TensorSpec("mean", "float32", latent), TensorSpec("std", "float32", latent)),
        ),
        GraphSpec(HINT, (TensorSpec("edges", "float32", picture),), (hint,)),
        GraphSpec(
            DENOISER,
            (
                TensorSpec("latent", "float32", latent),
                hint,
                TensorSpec("timestep", "int64", ("B",)),
                TensorSpec("kv_unet", "float32", ("G", "B", g.tokens, g.unet_width)),
                TensorSpec("kv_control", "float32", ("B", g.tokens, g.control_width)),
                TensorSpec("control_scale", "float32", ()),
            ),
            (TensorSpec("eps", "float32", ("G", *latent)),),
        ),
        GraphSpec(DECODER, (TensorSpec("latent", "float32", latent),), (TensorSpec("image", "float32", picture),)),
    )
    return {spec.name: spec for spec in specs}


def advance_spec(channels: int = 4) -> GraphSpec:
    """The spec of ``advance``, one linear step of all solvers (`moves`), the same for every base.

    With e = Σ_G halves · eps, and k_0 the latent, k_1 … k_3 what is kept::

        advanced_i = Σ_j moves_ij k_j + moves_i4 e          i = 0 … 4

    `advanced` is the state after the step and, last, what the step takes the clean latent to be.
    """
    latent = ("B", channels, "h", "w")
    slots = 1 + KEPT
    return GraphSpec(
        ADVANCE,
        (
            TensorSpec("eps", "float32", ("G", *latent)),
            TensorSpec("halves", "float32", ("G", "B")),
            TensorSpec("state", "float32", (slots, *latent)),
            TensorSpec("moves", "float32", (slots + 1, slots + 1, "B")),
        ),
        (TensorSpec("advanced", "float32", (slots + 1, *latent)),),
    )
