"""What the bench measures: configurations, and the statistics of their repeats."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from lsast_engines.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to paint, measured in processes of its own."""

    backend: str
    compute_dtype: str = "fp32"
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """What is given besides the preset, by the names of `lsast.Options`, `size` aside."""
    size: int
    batch: int = 1
    """Pictures that go through the denoiser together."""

    @property
    def name(self) -> str:
        """What tells it from the others, for people."""
        parts = [self.backend, self.compute_dtype, *([self.preset] if self.preset else [])]
        parts += [f"{name} {value}" for name, value in self.options.items()]
        return " ".join([*parts, f"{self.size}²", *([f"batch {self.batch}"] if self.batch > 1 else [])])


@dataclass(frozen=True)
class Summary:
    """Repeats of one measurement."""

    n: int
    median: float
    least: float
    most: float

    @property
    def spread(self) -> float:
        """The largest less the smallest."""
        return self.most - self.least

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """The summary of at least one value."""
        return cls(len(values), statistics.median(values), min(values), max(values))

    def as_json(self) -> dict[str, float]:
        """All figures, the spread among them."""
        return {"n": self.n, "median": self.median, "min": self.least, "max": self.most, "spread": self.spread}


def parse_backend(text: str) -> tuple[str, str]:
    """Backend and compute dtype of a text such as ``openvino``, ``openvino:bf16`` or ``auto``.

    Raises:
        UsageError: an unknown compute dtype.
    """
    from lsast_engines.backends.base import ComputeDtype

    backend, _, compute_dtype = text.partition(":")
    if (compute_dtype or "fp32") not in get_args(ComputeDtype):
        raise UsageError(f"found {text!r}; expected BACKEND or BACKEND:DTYPE of {', '.join(get_args(ComputeDtype))}")
    return backend, compute_dtype or ("auto" if backend == "auto" else "fp32")


def parse_counts(text: str, what: str) -> list[int]:
    """Whole numbers of at least 1 from a text such as ``256,512``.

    Raises:
        UsageError: anything else.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise UsageError(f"found {what} {text!r}; expected different whole numbers from 1, such as 256,512")
    return counts


def plan(
    backends: Sequence[str],
    presets: Sequence[str | None],
    axes: Mapping[str, Sequence[Any]],
    sizes: Sequence[int],
    batches: Sequence[int],
) -> list[Configuration]:
    """Every backend with every preset and every combination of options.

    Each at the first size and the first batch, then at the other sizes, then at the other batches: growth is seen
    along each axis without measuring their product.

    Args:
        backends: see `parse_backend`.
        presets: names; None is without.
        axes: by the name of an option its values, as `lsast.images.contact_sheet.parse_axes` gives them.
        sizes: of the canvas, in pixels a side.
        batches: pictures in a batch.
    """
    extents = [(sizes[0], batches[0]), *((s, batches[0]) for s in sizes[1:]), *((sizes[0], b) for b in batches[1:])]
    return [
        Configuration(backend=name, compute_dtype=compute_dtype, preset=preset, options=options, size=size, batch=batch)
        for name, compute_dtype in map(parse_backend, backends)
        for preset in presets or [None]
        for options in _combinations(axes)
        for size, batch in extents
    ]


def _combinations(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
