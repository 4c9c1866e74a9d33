"""Where a painting comes from: what a file must say so that the very picture can be painted again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lsast_engines.errors import PictureError
from lsast_engines.spec import DENOISER

from . import __version__

if TYPE_CHECKING:
    from .options import Options
    from .painting import Painting
    from .workshop import Workshop

FORMAT = 1
"""Format number of the JSON that this version writes and reads."""

_LIBRARIES = {"numpy": "numpy", "opencv": "opencv-python-headless", "pillow": "pillow"}


@dataclass(frozen=True)
class Provenance:
    """What a painting was made of. No path, no time, nothing of the picture but a checksum."""

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
    def of(cls, painting: Painting, workshop: Workshop) -> Provenance:
        """The provenance of what this workshop paints."""
        bundle = workshop.opener.bundle
        engine = workshop.engines[DENOISER]
        return cls(
            bundle=bundle.manifest.name,
            bundle_sha256=hashlib.sha256(bundle.manifest.to_json().encode()).hexdigest(),
            styles={name: workshop.shelf[name].fingerprint for name in painting.mix.styles},
            picture_sha256=painting.picture_sha256(),
            mask_sha256=painting.mask_sha256(),
            painted=painting.canvas_size,
            backend=engine.backend,
            device=engine.device,
            arithmetic=engine.arithmetic,
            versions={"lsast": __version__, **_versions(engine.backend)},
        )

    def differences(self, other: Provenance) -> list[str]:
        """What keeps `other` from being the same picture: a line for every checksum that differs from ours."""
        faults = []
        for name, expected, found in (
            ("bundle", self.bundle_sha256, other.bundle_sha256),
            ("picture", self.picture_sha256, other.picture_sha256),
            ("mask", self.mask_sha256, other.mask_sha256),
            *((f"style {name}", digest, other.styles.get(name)) for name, digest in self.styles.items()),
        ):
            if found != expected:
                faults.append(f"{name}: found {_short(found)}; expected {_short(expected)}")
        return faults


def to_json(provenance: Provenance, options: Options, seconds: dict[str, float]) -> str:
    """The text that a file carries: everything of `provenance`, all options, and the seconds of every phase."""
    held = {
        "format": FORMAT,
        **dataclasses.asdict(provenance),
        "options": dataclasses.asdict(options),
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
    }
    return json.dumps(held)


def from_json(text: str, where: str) -> tuple[Provenance, Options]:
    """Read what `to_json` wrote; `where` names the file in messages.

    Raises:
        PictureError: no such JSON, or of another format.
        UsageError: options that this version does not understand.
    """
    from .options import Options

    try:
        held: dict[str, Any] = json.loads(text)
        form = held["format"]
        if form != FORMAT:
            raise PictureError(
                f"{where} was written in format {form}; this version reads format {FORMAT}: update lsast"
            )
        height, width = held["painted"]
        facts = {field.name: held[field.name] for field in dataclasses.fields(Provenance)}
        return Provenance(**{**facts, "painted": (height, width)}), Options(**held["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise PictureError(
            f"the lsast data of {where} cannot be read ({error!r}); expected what lsast wrote"
        ) from error


def parameters(provenance: Provenance, options: Options) -> str:
    """The line of settings that galleries of generated pictures read, in the form of AUTOMATIC1111's web UI.

    First the prompt, for which the style stands here; then `Name: value` pairs, of which that form knows most.
    """
    height, width = provenance.painted
    pairs = {
        "Steps": options.steps,
        "Sampler": options.solver,
        "CFG scale": options.guidance,
        "Seed": options.seed,
        "Size": f"{width}x{height}",
        "Model hash": provenance.bundle_sha256[:10],
        "Model": provenance.bundle,
        "Denoising strength": options.strength,
        "Control weight": options.control,
        "Version": f"lsast {provenance.versions['lsast']}",
    }
    # A value with a comma is quoted there, as JSON does it.
    texts = {name: json.dumps(str(value)) if "," in str(value) else str(value) for name, value in pairs.items()}
    return f"{options.style}\n" + ", ".join(f"{name}: {text}" for name, text in texts.items())


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}…"


def _versions(backend: str) -> dict[str, str]:
    found = {}
    for name, package in {**_LIBRARIES, backend: backend}.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:  # another wheel of the same library, such as onnxruntime-gpu or opencv-python
            continue
    return found
