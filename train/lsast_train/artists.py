"""Whose pictures are whose in a collection of artists, such as WikiArt or the data of adaptive style transfer (AST).

Never imports torch: a wrong name is reported at once.
"""

import csv
import difflib
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from lsast_engines.errors import TrainingError, fault_list
from lsast_engines.images import find_pictures

_FILE_COLUMNS = ("filename", "file", "path", "image")
_NAMED = re.compile(r"[^\W\d_]+(-[^\W_]+)+_.")
"""A file name that begins with an artist, such as ``claude-monet_water-lilies-1914``."""
_SHARE = 0.8


def style_name(artist: str) -> str:
    """An artist as folders and files spell it: ``Vincent van Gogh`` is ``vincent-van-gogh``."""
    plain = unicodedata.normalize("NFKD", artist).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def artists_of(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each artist under `folder`, by `style_name`.

    The artist is read from a CSV file in `folder` with a column ``artist`` and one of file names (``filename``,
    ``file``, ``path`` or ``image``; paths relative to `folder`, or plain names). Without one it is the part before
    ``_`` of the file's name, if most names have the form ``ARTIST_TITLE`` with a hyphen in the artist (WikiArt,
    ``STYLE/ARTIST_TITLE.jpg``); otherwise the name of the folder in `folder` (``Paul_Cezanne/…jpg``; of one in small
    letters with hyphens the part before ``_``, as in AST's ``ARTIST_TITLE/…jpg``).

    Raises:
        PictureError: no such folder, or no picture in it.
        TrainingError: a CSV file that cannot be read, or no artist of any picture.
    """
    paths = find_pictures(folder)
    listed = _listed(folder)
    by_file = sum(_NAMED.match(path.stem) is not None for path in paths) >= _SHARE * len(paths)
    found: dict[str, list[Path]] = {}
    for path in paths:
        inner = path.relative_to(folder)
        if listed:
            artist = listed.get(inner.as_posix(), listed.get(path.name, ""))
        else:
            artist = path.stem if by_file else inner.parts[0] if len(inner.parts) > 1 else ""
            # Where hyphens are the blanks, `_` begins the title; in `Vincent_van_Gogh` it is a blank.
            if by_file or ("-" in artist and artist.islower()):
                artist = artist.partition("_")[0]
        if name := style_name(artist):
            found.setdefault(name, []).append(path)
    if not found:
        raise TrainingError(
            f"found no artist of {len(paths)} pictures under {folder}; expected files ARTIST_TITLE.jpg, folders that "
            "are named after artists, or a CSV file with the columns filename and artist"
        )
    return dict(sorted(found.items()))


def pictures_by(artist: str, folder: Path) -> list[Path]:
    """The pictures of one artist under `folder`; `TrainingError` if it is not among those of `artists_of`."""
    found = artists_of(folder)
    name = style_name(artist)
    if name not in found:
        near = difflib.get_close_matches(name, found, 5, 0.5) or list(found)[:5]
        raise TrainingError(
            f"found no picture of {artist!r} under {folder}; expected one of {len(found)} artists such as "
            f"{', '.join(near)}"
        )
    return found[name]


def _listed(folder: Path) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for file in sorted(file for file in folder.glob("*.csv") if file.is_file()):
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                for row in csv.DictReader(lines):
                    column = next((name for name in _FILE_COLUMNS if row.get(name)), None)
                    if column is not None and row.get("artist"):
                        found[row[column].replace("\\", "/").removeprefix("./")] = row["artist"]
        except (OSError, ValueError, csv.Error) as error:
            raise TrainingError(fault_list(f"{file} cannot be read as a table:", [str(error)])) from error
    return found
