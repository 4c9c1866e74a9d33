"""Where a painting comes from: what must be known so that the very picture can be painted again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lsast_engines.bundle import Bundle
from lsast_engines.engine import Engine
from lsast_engines.spec import DENOISER

from . import __version__

if TYPE_CHECKING:
    from .painting import Painting
    from .shelf import Shelf

_LIBRARIES = {"numpy": "numpy", "opencv": "opencv-python-headless", "pillow": "pillow"}
"""What pixels go through besides the backend, and the wheel that it comes in."""


@dataclass(frozen=True)
class Provenance:
    """What a painting was made of. No path, no time, and nothing of the picture but a checksum."""

    bundle: str
    """Name of the bundle."""
    bundle_sha256: str
    """SHA-256 (hex) of its manifest, which holds that of every graph."""
    styles: dict[str, str]
    """By name, the fingerprint of every style that was used (`StyleFile.fingerprint`)."""
    picture_sha256: str
    """SHA-256 (hex) of the picture's pixels, upright, 8-bit, with opacity: the same for any lossless file of it."""
    mask_sha256: str | None
    """SHA-256 (hex) of what the mask left to paint; None without a mask."""
    painted: tuple[int, int]
    """Height and width that were painted, in pixels."""
    backend: str
    device: str
    arithmetic: str
    versions: dict[str, str]
    """Of lsast, the backend and the libraries that pixels go through."""

    @classmethod
    def of(cls, painting: Painting, bundle: Bundle, engines: Mapping[str, Engine], shelf: Shelf) -> Provenance:
        """The provenance of what these engines paint."""
        engine = engines[DENOISER]
        return cls(
            bundle=bundle.manifest.name,
            bundle_sha256=bundle_sha256(bundle),
            styles={name: shelf[name].fingerprint for name in painting.mix.styles},
            picture_sha256=painting.picture_sha256(),
            mask_sha256=painting.mask_sha256(),
            painted=painting.canvas_size,
            backend=engine.backend,
            device=engine.device,
            arithmetic=engine.arithmetic,
            versions={"lsast": __version__, **_versions(engine.backend)},
        )

    def changes(self, later: Provenance) -> list[str]:
        """What may make the same picture come out otherwise, ``name old, now new`` each: backend and versions."""
        before, now = ({"backend": p.backend, "device": p.device, **p.versions} for p in (self, later))
        return [
            f"{name} {before.get(name, 'none')}, now {now.get(name, 'none')}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]


def bundle_sha256(bundle: Bundle) -> str:
    """SHA-256 (hex) of a bundle's manifest."""
    return hashlib.sha256(bundle.manifest.to_json().encode()).hexdigest()


def pixels_sha256(*planes: npt.NDArray[np.uint8] | None) -> str:
    """SHA-256 (hex) over shapes and values of arrays; None adds nothing."""
    digest = hashlib.sha256()
    for plane in planes:
        if plane is not None:
            digest.update(f"{plane.shape}".encode())
            digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()


def _versions(backend: str) -> dict[str, str]:
    found = {}
    for name, package in {**_LIBRARIES, backend: backend}.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:  # another wheel of the same library, such as onnxruntime-gpu or opencv-python
            continue
    return found
