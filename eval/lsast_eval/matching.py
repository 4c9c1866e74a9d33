"""Matches each method's results with their contents, by file stem."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lsast_engines.errors import PictureError, UsageError, fault_list
from lsast_engines.images import find_pictures

log = logging.getLogger("lsast.eval")

_NAMED = 5
"""How many stems an error names; the rest is counted."""


@dataclass(frozen=True)
class Matches:
    """Contents and every method's results, in the order of `stems`."""

    stems: tuple[str, ...]
    """File stems of the contents, sorted."""
    contents: tuple[Path, ...]
    """A file for each stem."""
    results: Mapping[str, tuple[Path, ...]]
    """Method → a file for each stem, in the order the methods were given."""
    notes: tuple[str, ...] = ()
    """What was left out."""


def artist_of(works: Path) -> str:
    """The artist of a folder of works: its name, also where it is a link to a folder of another name."""
    return Path(os.path.abspath(works)).name


def match_by_stem(contents: Path, methods: Mapping[str, Path]) -> Matches:
    """Match pictures at any depth of `contents` with those of each method's folder.

    Pictures of a method that no content has the stem of are left out, with a note and a warning.

    Raises:
        UsageError: no method, or a name that a reference row could have.
        PictureError: a folder without pictures, two pictures of one stem, or contents without a result.
    """
    if not methods:
        raise UsageError("found no method; expected at least one: NAME=DIR, a folder of stylised pictures")
    if odd := [name for name in methods if not name or name.startswith("(")]:
        raise UsageError(f"found the method names {odd}; expected names that are not empty and begin without '('")
    faults: list[str] = []
    notes: list[str] = []

    def by_stem(label: str, folder: Path) -> dict[str, Path]:
        try:
            paths = find_pictures(folder)
        except PictureError as error:
            faults.append(f"{label}: {error}")
            return {}
        found: dict[str, Path] = {}
        for path in paths:
            if (twin := found.setdefault(path.stem, path)) is not path:
                faults.append(f"{label}: {twin} and {path} have the same stem; expected one picture a stem")
        return found

    originals = by_stem("contents", contents)
    stems = tuple(sorted(originals))
    results: dict[str, tuple[Path, ...]] = {}
    for name, folder in methods.items():
        found = by_stem(name, folder)
        if missing := [stem for stem in stems if stem not in found] if found else []:
            faults.append(
                f"{name}: found no result for {_some(missing)} of {len(stems)} contents; expected a picture of the "
                f"same stem for each under {folder}"
            )
        if extra := sorted(found.keys() - originals.keys()):
            notes.append(f"{name}: left out {_some(extra)}, for which there is no content")
        results[name] = tuple(found[stem] for stem in stems if stem in found)
    if faults:
        raise PictureError(fault_list("the folders do not match:", faults))
    for note in notes:
        log.warning("%s", note)
    return Matches(stems, tuple(originals[stem] for stem in stems), results, tuple(notes))


def _some(stems: list[str]) -> str:
    more = f" and {len(stems) - _NAMED} more" if len(stems) > _NAMED else ""
    return ", ".join(stems[:_NAMED]) + more
