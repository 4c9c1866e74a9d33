"""The provenance of a painting: what must be known to paint the same picture again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.environment import installed_versions

from .._version import __version__

_LIBRARIES = {"numpy": "numpy", "opencv": "opencv-python-headless", "pillow": "pillow"}
"""The libraries that pixels pass besides the backend, and the wheel of each."""


@dataclass(frozen=True)
class Provenance:
    """What a painting was made of. It holds no path, no time, and of the picture nothing but a checksum."""

    bundle: str
    """Name of the bundle."""
    bundle_sha256: str
    """SHA-256 (hex) of its manifest, which holds that of every graph."""
    styles: dict[str, str]
    """The fingerprint of every style that was used (`StyleFile.fingerprint`), by name."""
    picture_sha256: str
    """SHA-256 (hex) of the picture's pixels, upright, 8-bit, with opacity: the same for any lossless file of it."""
    mask_sha256: str | None
    """SHA-256 (hex) of the mask as `read_mask` gives it; None without a mask."""
    painted: tuple[int, int]
    """Height and width that were painted, in pixels."""
    backend: str
    device: str
    compute_dtype: str
    versions: dict[str, str]
    """Versions of lsast, the backend and the libraries that pixels pass."""

    def changes(self, later: Provenance) -> list[str]:
        """Backend, device, compute dtype and versions that differ in `later`, as ``name old, now new`` each."""
        before, now = (
            {"backend": p.backend, "device": p.device, "compute_dtype": p.compute_dtype, **p.versions}
            for p in (self, later)
        )
        return [
            f"{name} {before.get(name, 'none')}, now {now.get(name, 'none')}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]


def bundle_sha256(bundle: Bundle) -> str:
    """SHA-256 (hex) of a bundle's manifest."""
    return hashlib.sha256(bundle.manifest.to_json().encode()).hexdigest()


def versions(backend: str) -> dict[str, str]:
    """Versions of lsast, `backend` and the libraries that pixels pass."""
    wheels = {**_LIBRARIES, backend: backend}
    # Another wheel of the same library, such as onnxruntime-gpu or opencv-python, is left out.
    found = installed_versions(*wheels.values())
    return {"lsast": __version__, **{name: found[wheel] for name, wheel in wheels.items() if wheel in found}}
