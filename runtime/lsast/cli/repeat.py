"""Repeating a painting from what its file says, and proving that it is the same: ``lsast-run --from``."""

import contextlib
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lsast_engines.bundle.bundle import Bundle, find_bundle
from lsast_engines.errors import BackendError, LsastError, UsageError, fault_list
from lsast_engines.images import pixels_sha256, read_picture

from ..images.mask import read_mask
from ..images.metadata import Provenance, Record, bundle_sha256, read_record
from ..options.options import current_options, preset_options
from ..options.style_mix import Mix
from ..result import Result, validate_output_path
from ..stylizer import Stylizer, load
from .run import ProgressBars


def repeat(
    origin: Path, paths: list[Path], where: dict[str, Any], options: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Verify what a painting was made of, and repeat it; → the report for ``--json``, and the line printed without it.

    Args:
        origin: the painting.
        paths: empty to verify the bundle and the styles alone; IN to verify the picture too, paint it again and
            compare; IN and OUT to write the painting instead of comparing.
        where: arguments of `load` that replace those of the painting.
        options: options that replace those of the painting; then nothing is verified.

    Raises:
        LsastError: the painting was made of something else, or another picture came out.
        BackendError: what it was painted with is not here, and `where` names nothing else.
        UsageError: too many paths, or `options` without OUT.
    """
    if len(paths) > 2 or (options.keys() - {"mask"} and len(paths) < 2):
        raise UsageError(
            "found --from with more than IN and OUT, or with options and no OUT; expected --from PAINTING [IN [OUT]]"
        )
    for path in (origin, *paths[:1], *filter(None, [options.get("mask")])):
        if (path := Path(path)).exists() and not path.is_file():
            raise UsageError(f"found {path}, which is no file, with --from; expected one: it is read more than once")
    record = read_record(origin)
    made = record.provenance
    report = {"from": str(origin), **asdict(made), "options": asdict(record.options)}
    options = current_options(options)
    mask = options.pop("mask", None)
    source, out = (*paths, None, None)[:2]
    if out is not None:
        validate_output_path(out)
    if not options:
        verify_inputs(record, origin, Bundle.open(find_bundle(where.get("bundle"))), source, mask)
    if source is None:
        return report, f"{origin}: the bundle and the styles that it was painted with are here"
    changed = {**asdict(record.options), **preset_options(options.get("preset")), **options}
    with contextlib.closing(ProgressBars(1)) as bars, _open(made, where, changed) as stylizer:
        result = stylizer.stylize(source, **changed, mask=mask, on_step=bars.on_step)
    if out is None:
        compare_pixels(result, origin, record)
        return {**report, "same": True}, f"{origin}: {source} paints the same again, to the last bit"
    result.save(out)
    assert result.provenance is not None
    return {**report, **asdict(result.provenance), "options": asdict(result.options), "out": str(out)}, str(out)


def _open(made: Provenance, where: dict[str, Any], options: dict[str, Any]) -> Stylizer:
    same = {"backend": made.backend, "device": made.device, "compute_dtype": made.compute_dtype}
    try:
        return load(**{**same, **where}, options=options)
    except BackendError as error:
        autos = " ".join(f"--{key.replace('_', '-')} auto" for key in same if key not in where)
        if not autos:
            raise
        raise BackendError(
            f"{error}; the painting was made with {made.backend} on {made.device} in {made.compute_dtype}: to paint "
            f"nearly the same with what is here, name OUT and add {autos}"
        ) from error


def verify_inputs(record: Record, origin: Path, bundle: Bundle, picture: Path | None, mask: Path | None) -> None:
    """Check that the painting `origin` was made of what is here, of `picture` and `mask` if `picture` is given. An
    `LsastError` names all checksums that differ; a `UsageError` a style that is not here, or a mask that is not
    given."""
    made = record.provenance
    faults = _difference(f"bundle {made.bundle}", bundle_sha256(bundle), made.bundle_sha256)
    if faults:  # its styles are of another base as well
        raise LsastError(fault_list(f"{origin} was painted with another bundle; name it with --bundle:", faults))
    for name in Mix.parse(record.options.style).styles:
        faults += _difference(f"style {name}", bundle.open_style(name).fingerprint, made.styles.get(name))
    if picture is not None:
        if made.mask_sha256 and mask is None:
            raise UsageError(f"{origin} was painted with a mask; give it with --mask")
        source = read_picture(picture)
        faults += _difference(f"picture {picture}", pixels_sha256(source.rgb, source.alpha), made.picture_sha256)
        if mask is not None:
            found = pixels_sha256(read_mask(mask, source.size, record.options.feather))
            faults += _difference(f"mask {mask}", found, made.mask_sha256)
    if faults:
        raise LsastError(fault_list(f"{origin} was painted from something else than is here:", faults))


def compare_pixels(again: Result, origin: Path, record: Record) -> None:
    """Check that a repeated painting equals the one in a file, after it is encoded in that file's format. An
    `LsastError` says by how much it differs, and what has changed since."""
    encoded = io.BytesIO()
    again.write(encoded, origin.suffix)
    old, new = read_picture(origin), read_picture(encoded.getvalue())
    if old.size != new.size:
        raise LsastError(f"{origin} is of {old.size} pixels (height, width), the repeated painting of {new.size}")
    difference = np.abs(old.rgb.astype(np.int16) - new.rgb)
    if difference.any():
        assert again.provenance is not None
        changes = record.provenance.changes(again.provenance)
        since = f"; since then: {'; '.join(changes)}" if changes else ""
        raise LsastError(
            f"{origin} is not what the same call paints here: {np.count_nonzero(difference) / difference.size:.2%} of "
            f"the values differ, by up to {difference.max()} of 255{since}"
        )


def _difference(what: str, found: str, expected: str | None) -> list[str]:
    if found == expected:
        return []
    return [f"{what}: found {found[:12]}…; expected {f'{expected[:12]}…' if expected else 'none'}"]
