"""Painting a picture again from what its file says of it, and proving that it is the same."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.errors import LsastError, UsageError, fault_list
from lsast_engines.images import read_picture

from ..images.mask import read_mask
from ..images.metadata import Record
from ..images.provenance import bundle_sha256, pixels_sha256
from ..options.style_mix import Mix

if TYPE_CHECKING:
    from ..result import Result


def verify(record: Record, where: Path, bundle: Bundle, picture: Path | None = None, mask: Path | None = None) -> None:
    """Make sure that what a painting was made of is what is here.

    Args:
        record: what its file says.
        where: the file, for messages.
        bundle: what would be painted with.
        picture: what would be painted; None leaves it and the mask unchecked.
        mask: where it would be painted.

    Raises:
        LsastError: something is not; all of it at once, by its checksum.
        UsageError: a style that is not here; or the painting was made through a mask, and none is given.
        PictureError: the picture or the mask cannot be read.
    """
    told = record.provenance
    faults = _difference(f"bundle {told.bundle}", bundle_sha256(bundle), told.bundle_sha256)
    if faults:  # its styles are of another base, too
        raise LsastError(fault_list(f"{where} was painted with another bundle; name it with --bundle:", faults))
    mix = Mix.parse(record.options.style)
    mix.check(list(bundle.styles()), bundle.manifest.stages)
    for name in mix.styles:
        faults += _difference(f"style {name}", bundle.open_style(name).fingerprint, told.styles.get(name))
    if picture is not None:
        if told.mask_sha256 and mask is None:
            raise UsageError(f"{where} was painted through a mask; give it with --mask")
        source = read_picture(picture)
        faults += _difference(f"picture {picture}", pixels_sha256(source.rgb, source.alpha), told.picture_sha256)
        if mask is not None:
            found = pixels_sha256(read_mask(mask, source.size, record.options.feather))
            faults += _difference(f"mask {mask}", found, told.mask_sha256)
    if faults:
        raise LsastError(fault_list(f"{where} was painted from something else than is here:", faults))


def compare(again: Result, first: Path, record: Record) -> None:
    """Make sure that a repeated painting is the one in a file, as that file's format holds it.

    Raises:
        LsastError: it is not; by how much, and what has changed since.
        PictureError: the file cannot be read.
    """
    held = io.BytesIO()
    again.write(held, first.suffix)
    one, other = read_picture(first), read_picture(held.getvalue())
    if one.size != other.size:
        raise LsastError(f"{first} is of {one.size} pixels (height, width), the repeated painting of {other.size}")
    difference = np.abs(one.rgb.astype(np.int16) - other.rgb)
    if difference.any():
        changes = record.provenance.changes(again.provenance) if again.provenance else []
        since = f"; since then: {'; '.join(changes)}" if changes else ""
        raise LsastError(
            f"{first} is not what the same call paints here: {np.count_nonzero(difference) / difference.size:.2%} of "
            f"the values differ, by up to {difference.max()} of 255{since}"
        )


def _difference(what: str, found: str, expected: str | None) -> list[str]:
    if found == expected:
        return []
    return [f"{what}: found {found[:12]}…; expected {f'{expected[:12]}…' if expected else 'none'}"]
