"""Optimization profiles: TensorRT compiles an engine for a range of each dynamic axis, and tunes it for one length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ...bundle.graph_spec import (
    CONTROLNET_COND,
    VAE_DECODER,
    VAE_DECODER_TINY,
    VAE_ENCODER,
    GraphSpec,
    TensorSpec,
    downsampling_level,
)
from ...errors import BackendError, UsageError, fault_list
from ..base import FACTOR, Shape


class Range(NamedTuple):
    """Minimum, optimum and maximum length of an axis."""

    min: int
    opt: int
    max: int


class InputShapes(NamedTuple):
    """Minimum, optimum and maximum shape of an input, in TensorRT's order."""

    min: Shape
    opt: Shape
    max: Shape


ONE_BY_ONE = (VAE_ENCODER, CONTROLNET_COND, VAE_DECODER, VAE_DECODER_TINY)
"""Graphs that run on one picture at a time: at four of 1024² a decoder would need several times the memory."""

SIDE, BATCH, GUIDANCE = Range(384, 512, 1024), Range(1, 1, 4), Range(1, 2, 2)
"""The default ranges."""

Profile = dict[str, InputShapes]
"""The shapes that an engine was compiled for, by input."""


@dataclass(frozen=True)
class ShapeRanges:
    """The sizes that a user wants to run a compiled engine with.

    Raises:
        UsageError: ranges that are not ordered, or sides that are no multiples of 8; all faults at once.
    """

    side: Range = SIDE
    """Height and width in pixels, multiples of 8."""
    batch: Range = BATCH
    """Pictures at once, in graphs other than `ONE_BY_ONE`."""
    guidance: Range = GUIDANCE
    """Passes for guidance: 1 without, 2 with."""

    def __post_init__(self) -> None:
        faults = [
            f"{name}: found {', '.join(map(str, axis))}; expected minimum, optimum and maximum, each at least 1"
            for name, axis in (("side", self.side), ("batch", self.batch), ("guidance", self.guidance))
            if not 1 <= axis.min <= axis.opt <= axis.max
        ]
        if any(side % FACTOR for side in self.side):
            faults.append(f"side: found {', '.join(map(str, self.side))}; expected multiples of {FACTOR} pixels")
        if self.guidance.max > 2:
            faults.append(f"guidance: found {self.guidance.max} passes; expected 1 or 2")
        if faults:
            raise UsageError(fault_list("invalid shape ranges of an engine:", faults))

    def profile(self, spec: GraphSpec) -> Profile:
        """The shapes that every input of `spec` may have."""
        batch = Range(1, 1, 1) if spec.name in ONE_BY_ONE else self.batch
        axes = {"B": batch, "G": self.guidance, "H": self.side, "W": self.side}
        cells = {axis for tensor in spec.inputs for axis in tensor.shape if isinstance(axis, str) and axis[0] in "hw"}
        axes |= {axis: Range(*(side // FACTOR >> downsampling_level(axis) for side in self.side)) for axis in cells}
        return {tensor.name: _input_shapes(tensor, axes) for tensor in spec.inputs}


def _input_shapes(tensor: TensorSpec, axes: Mapping[str, Range]) -> InputShapes:
    ranges = [Range(axis, axis, axis) if isinstance(axis, int) else axes[axis] for axis in tensor.shape]
    return InputShapes(*(tuple(lengths[place] for lengths in ranges) for place in range(3)))


def check_profile(profile: Profile, shapes: Mapping[str, Shape], graph: str) -> None:
    """Refuse shapes that the engine of `graph` was not compiled for.

    Raises:
        BackendError: all inputs outside the profile, and how to compile an engine that accepts them.
    """
    faults = []
    for name, shape in shapes.items():
        allowed = profile[name]
        if not all(low <= found <= high for low, found, high in zip(allowed.min, shape, allowed.max, strict=True)):
            faults.append(f"{name}: found {list(shape)}; expected {list(allowed.min)} to {list(allowed.max)}")
    if faults:
        heading = f"the engine of graph {graph} was not compiled for this; compile it with a wider --sides or --batch:"
        raise BackendError(fault_list(heading, faults))
