"""What `lsast-run` does besides painting what it is given: repeating a painting, and contact sheets.

Each gives what `--json` prints and the line that is printed without it.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lsast_engines.bundle.bundle import Bundle, find_bundle
from lsast_engines.errors import UsageError

from ..images.contact_sheet import contact_sheet, parse_axes
from ..images.metadata import read_record
from ..options.defaults import Defaults
from ..options.presets import preset_options
from ..result import Result, validate_output_path
from ..stylizer import load
from .repeat import compare, verify
from .run import ProgressBars

Report = dict[str, Any]


def repeat(origin: Path, paths: list[Path], where: dict[str, Any], options: dict[str, Any]) -> tuple[Report, str]:
    """Verify what a painting was made of, and repeat it.

    Args:
        origin: the painting.
        paths: nothing to verify the bundle and the styles alone; the picture, to verify that too, paint it again and
            compare; or the picture and where to write it, instead of comparing.
        where: what `load` takes, as far as it was given; the rest is as it was.
        options: what is to be different; then nothing is verified.

    Raises:
        LsastError: what it was made of is not what is here, or another picture came out.
        UsageError: too many paths, or `options` without a place to write to.
    """
    if len(paths) > 2 or (options.keys() - {"mask"} and len(paths) < 2):
        raise UsageError(
            "found --from with more than IN and OUT, or with options and no OUT; expected --from PAINTING [IN [OUT]]"
        )
    record = read_record(origin)
    told = record.provenance
    report: Report = {"from": str(origin), **asdict(told), "options": asdict(record.options)}
    mask = options.pop("mask", None)
    source, out = (*paths, None, None)[:2]
    if out is not None:
        validate_output_path(out)
    if not options:
        verify(record, origin, Bundle.open(find_bundle(where.get("bundle"))), source, mask)
    if source is None:
        return report, f"{origin}: the bundle and the styles that it was painted with are here"
    same = {"backend": told.backend, "device": told.device, "compute_dtype": told.compute_dtype}
    with contextlib.closing(ProgressBars(1)) as bars, load(**{**same, **where}) as stylizer:
        changed = {**asdict(record.options), **preset_options(options.get("preset")), **options}
        result = stylizer.stylize(source, **changed, mask=mask, on_step=bars.on_step)
    if out is None:
        compare(result, origin, record)
        return {**report, "same": True}, f"{origin}: {source} paints the same again, to the last bit"
    result.save(out)
    return {**report, "options": asdict(result.options), "out": str(out)}, str(out)


def sheet(
    source: Path, out: Path, axes: tuple[str, ...], where: dict[str, Any], options: dict[str, Any]
) -> tuple[Report, str]:
    """Paint a picture with every combination of some options and write them on one contact sheet.

    Args:
        source: the picture.
        out: the sheet to write.
        axes: see `parse_axes`.
        where: what `load` takes.
        options: options of all paintings.

    Raises:
        LsastError: see `contact_sheet`.
    """
    validate_output_path(out)
    parsed = parse_axes(axes)
    with load(**where) as stylizer:
        common = Defaults(stylizer.bundle).resolve(options)
        with tqdm(desc="painting", unit="cell", leave=False, disable=None) as bar:

            def on_cell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            made = contact_sheet(stylizer, source, parsed, on_cell=on_cell, **options)
    Result(made.image, {}, common).save(out)
    return {"out": str(out), "axes": parsed, "cells": len(made.cells), "options": asdict(common)}, str(out)
