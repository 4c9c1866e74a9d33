"""What must be known to paint a picture again; in a file a JSON text of our own, beside the settings for galleries.

============ ==================================== =====================================================
format       JSON of `lsast`                      settings, in the form of AUTOMATIC1111's web UI
============ ==================================== =====================================================
PNG          text chunk ``lsast``                 text chunk ``parameters``
all others   EXIF MakerNote, after ``lsast\\0``    EXIF UserComment, UTF-16 as the standard has it
============ ==================================== =====================================================

Nothing else is written. Of the picture's own metadata only the colour profile is kept: no camera, no place, no name, no
comment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.json_fields import parse_json, read_object, read_value
from lsast_engines.environment import installed_versions
from lsast_engines.errors import LsastError, PictureError
from lsast_engines.picture_file import open_file, open_image

from .._version import __version__
from ..options.options import Options, current_options

FORMAT = 1
"""Format number of the JSON."""

_EXIF, _SOFTWARE, _MAKER_NOTE, _USER_COMMENT = 0x8769, 0x0131, 0x927C, 0x9286
_MARK, _UNICODE = b"lsast\0", b"UNICODE\0"

_LIBRARIES = {"numpy": "numpy", "opencv": "opencv-python-headless", "pillow": "pillow"}
"""The libraries that pixels pass besides the backend, and the wheel of each."""


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Record:
    """What a file says of its painting."""

    provenance: Provenance
    options: Options
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Wall time of every phase; most files do not say it, so that equal paintings are equal files."""

    def to_json(self) -> str:
        """The JSON text of a file."""
        content = {"format": FORMAT, **dataclasses.asdict(self.provenance), "options": dataclasses.asdict(self.options)}
        if self.seconds:
            content["seconds"] = {phase: round(value, 4) for phase, value in self.seconds.items()}
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str, where: str) -> Record:
        """Read the text of `to_json`; `where` names the file in messages. Raises a `PictureError` for another text or
        format, a `UsageError` for invalid options."""
        try:
            content: dict[str, Any] = parse_json(text)
            if (found := content["format"]) != FORMAT:
                raise PictureError(
                    f"{where} was written in format {found!r:.40}; this version reads format {FORMAT}: update lsast"
                )
            content = {"compute_dtype": content.get("arithmetic"), "seconds": {}, **content}  # the name of before 0.1
            faults: list[str] = []
            known = {field.name: content[field.name] for field in dataclasses.fields(Provenance)}
            provenance = read_object(Provenance, known, "", faults)
            seconds = read_value(dict[str, float], content["seconds"], "seconds", faults)
            if provenance is None or faults or "lsast" not in provenance.versions:
                raise ValueError("; ".join(faults) or "versions: found no lsast")
            if not isinstance(content["options"], dict):
                raise TypeError("options is no object")
            return cls(provenance, Options(**current_options(content["options"])), seconds)
        except (ValueError, KeyError, TypeError) as error:
            raise PictureError(
                f"the record of lsast in {where} cannot be read ({error!r}); expected a whole one"
            ) from error

    def a1111_parameters(self) -> str:
        """The settings that galleries read: the style in the place of a prompt, then ``Name: value`` pairs."""
        options, provenance = self.options, self.provenance
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
            "Control weight": options.control_scale,
            "Version": f"lsast {provenance.versions['lsast']}",
        }
        # A value with a comma is quoted, as in JSON.
        texts = {name: json.dumps(str(value)) if "," in str(value) else str(value) for name, value in pairs.items()}
        return f"{options.style}\n" + ", ".join(f"{name}: {text}" for name, text in texts.items())

    def pillow_save_args(self, form: str) -> dict[str, Any]:
        """Arguments of Pillow's `save` that write this into a file of the format `form`, a name of Pillow's."""
        if form == "PNG":
            chunks = PngImagePlugin.PngInfo()
            chunks.add_text("parameters", self.a1111_parameters())
            chunks.add_text("lsast", self.to_json())
            return {"pnginfo": chunks}
        exif = Image.Exif()
        exif[_SOFTWARE] = f"lsast {self.provenance.versions['lsast']}"
        inner = exif.get_ifd(_EXIF)
        inner[_MAKER_NOTE] = _MARK + self.to_json().encode()
        inner[_USER_COMMENT] = _UNICODE + self.a1111_parameters().encode("utf-16-be")
        exif[_EXIF] = inner  # TIFF looks only at what was set
        return {"exif": exif}


def bundle_sha256(bundle: Bundle) -> str:
    """SHA-256 (hex) of a bundle's manifest."""
    return hashlib.sha256(bundle.manifest.to_json().encode()).hexdigest()


def versions(backend: str) -> dict[str, str]:
    """See `Provenance.versions`."""
    wheels = {**_LIBRARIES, backend: backend}
    # Another wheel of the same library, such as onnxruntime-gpu or opencv-python, is left out.
    found = installed_versions(*wheels.values())
    return {"lsast": __version__, **{name: found[wheel] for name, wheel in wheels.items() if wheel in found}}


def read_record(source: str | Path | bytes) -> Record:
    """Read what a painting's file says of it; `source` is a path, or the bytes of the file. Raises a `PictureError` for
    what is no picture, or one without a record, a `UsageError` for invalid options."""
    name = str(source) if isinstance(source, (str, os.PathLike)) else "the picture"
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(Path(source)) as handle:
            text = _text(open_image(handle, name))
    except FileNotFoundError:
        raise PictureError(f"found no file {name}; expected a painting of lsast") from None
    except (LsastError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise PictureError(f"{name} cannot be read ({error}); expected a painting of lsast") from error
    if text is None:
        raise PictureError(f"{name} does not say how it was painted; expected a picture that lsast wrote")
    return Record.from_json(text, name)


def _text(image: Image.Image) -> str | None:
    """Our JSON in an open picture, or None."""
    if isinstance(found := image.info.get("lsast"), str):
        return found
    note = image.getexif().get_ifd(_EXIF).get(_MAKER_NOTE)
    if isinstance(note, bytes) and note.startswith(_MARK):
        return note.removeprefix(_MARK).decode("utf-8", "replace")
    return None
