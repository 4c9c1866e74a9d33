"""Which rows of ours `compare.py` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.bench.configurations import Configuration, parse_backend
from lsast.images.contact_sheet import parse_axes
from lsast_engines.bundle.bundle import find_bundle
from lsast_engines.errors import UsageError

OURS = ("released", "exact", "balanced", "fast")
"""Presets that are measured, the first in float32 alone: it computes what the reference does."""


@dataclass(frozen=True)
class Own:
    """A row of ours."""

    name: str
    bundle: str
    configuration: Configuration

    @classmethod
    def parse(cls, text: str, bundle: str, size: int) -> Own:
        """A row of a text ``NAME: key=value, …``: `bundle`, `backend` (NAME[:TYPE]), `preset`, and options.

        Raises:
            UsageError: a text that is no row.
        """
        name, colon, rest = text.partition(":")
        pairs = [part.strip().partition("=") for part in rest.split(",")]
        if not (colon and name.strip() and all(equals for _, equals, _ in pairs)):
            raise UsageError(f"found the row {text!r}; expected NAME: key=value, key=value")
        given = {key.strip(): value.strip() for key, _, value in pairs}
        bundle = str(find_bundle(given.pop("bundle", bundle)))
        backend, compute_dtype = parse_backend(given.pop("backend", "onnxruntime"))
        preset = given.pop("preset", None)
        options = {key: value for key, (value,) in parse_axes([f"{k}={v}" for k, v in given.items()]).items()}
        chosen = Configuration(backend=backend, compute_dtype=compute_dtype, preset=preset, options=options, size=size)
        return cls(name.strip(), bundle, chosen)


def rows_of_ours(
    bundle: str, size: int, backends: Sequence[str], presets: Sequence[str], texts: Sequence[str]
) -> list[Own]:
    """Every backend with every preset, then those of `texts`."""
    ours = []
    for backend, compute_dtype in map(parse_backend, backends):
        name = backend if backend == "auto" else f"{backend} {compute_dtype}"
        for preset in presets or (OURS if name == "onnxruntime fp32" else OURS[1:]):
            how = Configuration(backend=backend, compute_dtype=compute_dtype, preset=preset, size=size)
            ours.append(Own(f"{preset}, {name}", bundle, how))
    return ours + [Own.parse(text, bundle, size) for text in texts]
