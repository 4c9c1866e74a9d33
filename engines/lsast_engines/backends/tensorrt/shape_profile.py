"""The sizes that a compiled engine serves: TensorRT compiles for a range of every dynamic axis, best for one of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...bundle.graph_spec import GraphSpec, TensorSpec, halvings
from ...errors import BackendError, UsageError, fault_list

Shape = tuple[int, ...]

FACTOR = 8
"""Pixels along a side of one latent cell, in every base that can be exported."""


class Span(NamedTuple):
    """Smallest, best served and largest length of an axis."""

    least: int
    best: int
    most: int


class ShapeSpan(NamedTuple):
    """Smallest, best served and largest shape of an input, in TensorRT's order."""

    least: Shape
    best: Shape
    most: Shape


SIDE, BATCH, GUIDANCE = Span(384, 512, 1024), Span(1, 1, 4), Span(1, 2, 2)
"""What `Ranges` serves unless told otherwise."""

Profile = dict[str, ShapeSpan]
"""What an engine was compiled for, by input name."""


@dataclass(frozen=True)
class Ranges:
    """What a user may ask of a compiled engine.

    Raises:
        UsageError: spans that are not ordered, or sides that are no multiples of 8; all faults at once.
    """

    side: Span = SIDE
    """Height and width in pixels, multiples of 8."""
    batch: Span = BATCH
    """Pictures at once."""
    guidance: Span = GUIDANCE
    """Rows for guidance: 1 without, 2 with."""

    def __post_init__(self) -> None:
        faults = [
            f"{name}: found {', '.join(map(str, span))}; expected smallest, best and largest, each at least 1"
            for name, span in (("side", self.side), ("batch", self.batch), ("guidance", self.guidance))
            if not 1 <= span.least <= span.best <= span.most
        ]
        if any(side % FACTOR for side in self.side):
            faults.append(f"side: found {', '.join(map(str, self.side))}; expected multiples of {FACTOR} pixels")
        if self.guidance.most > 2:
            faults.append(f"guidance: found {self.guidance.most} rows; expected 1 or 2")
        if faults:
            raise UsageError(fault_list("an engine cannot be compiled for these ranges:", faults))

    def profile(self, spec: GraphSpec) -> Profile:
        """The shapes that every input of `spec` may take."""
        axes = {"B": self.batch, "G": self.guidance, "H": self.side, "W": self.side}
        cells = {axis for tensor in spec.inputs for axis in tensor.shape if isinstance(axis, str) and axis[0] in "hw"}
        axes |= {axis: Span(*(side // FACTOR >> halvings(axis) for side in self.side)) for axis in cells}
        return {tensor.name: _shape_span(tensor, axes) for tensor in spec.inputs}


def _shape_span(tensor: TensorSpec, axes: Mapping[str, Span]) -> ShapeSpan:
    spans = [Span(axis, axis, axis) if isinstance(axis, int) else axes[axis] for axis in tensor.shape]
    return ShapeSpan(*(tuple(span[end] for span in spans) for end in range(3)))


def output_shapes(spec: GraphSpec, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of the outputs of `spec` for inputs of `shapes`, all inputs given."""
    axes: dict[str, int] = {}
    for tensor in spec.inputs:
        for axis, length in zip(tensor.shape, shapes[tensor.name], strict=True):
            if isinstance(axis, str):
                axes[axis] = length
    for pixels, cells in (("H", "h"), ("W", "w")):
        if cells in axes:
            axes.setdefault(pixels, axes[cells] * FACTOR)
        elif pixels in axes:
            axes[cells] = axes[pixels] // FACTOR
    for tensor in spec.outputs:
        for axis in tensor.shape:
            if isinstance(axis, str) and axis not in axes:
                axes[axis] = axes[axis[0]] >> halvings(axis)
    return {
        tensor.name: tuple(axis if isinstance(axis, int) else axes[axis] for axis in tensor.shape)
        for tensor in spec.outputs
    }


def require_in_profile(profile: Profile, shapes: Mapping[str, Shape], graph: str) -> None:
    """Refuse shapes that the engine of `graph` was not compiled for.

    Raises:
        BackendError: all inputs outside their span, and what compiles an engine that takes them.
    """
    faults = []
    for name, shape in shapes.items():
        span = profile[name]
        if not all(low <= found <= high for low, found, high in zip(span.least, shape, span.most, strict=True)):
            faults.append(f"{name}: found {list(shape)}; expected {list(span.least)} to {list(span.most)}")
    if faults:
        heading = f"the engine of graph {graph} was not compiled for this; compile it with a wider --sides or --batch:"
        raise BackendError(fault_list(heading, faults))


def profile_to_json(profile: Profile) -> dict[str, list[list[int]]]:
    """`profile` as plain lists: smallest, best, largest."""
    return {name: [list(shape) for shape in span] for name, span in profile.items()}


def profile_from_json(value: Any) -> Profile:
    """What `profile_to_json` gave.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, dict):
        raise ValueError("no object")
    profile = {}
    for name, ends in value.items():
        shapes = [tuple(shape) for shape in ends]
        if len(shapes) != 3 or not all(isinstance(axis, int) for shape in shapes for axis in shape):
            raise ValueError(f"{name}: found {ends!r}; expected three shapes")
        profile[name] = ShapeSpan(*shapes)
    return profile
