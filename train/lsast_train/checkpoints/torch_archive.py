"""The zip archives that torch.save writes, read without extracting anything."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

import torch


class Refused(Exception):  # noqa: N818 - the restricted loader turns it into a TrainingError
    """The file names, holds or does something that is not allowed."""


class Archive:
    """The zip archive that torch.save writes, its storages mapped from the file.

    Raises:
        Refused: entries that torch.save does not write.
        zipfile.BadZipFile: a damaged archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            self._check(entries)
            pickles = [entry for entry in entries if PurePosixPath(entry.filename).name == "data.pkl"]
            if len(pickles) != 1:
                raise Refused(f"{len(pickles)} entries data.pkl; expected one")
            self.pickle = archive.read(pickles[0])
            """The program that rebuilds what was saved."""
            self._root = pickles[0].filename.removesuffix("data.pkl")
            byteorder = next((entry for entry in entries if entry.filename == f"{self._root}byteorder"), None)
            if byteorder is not None and archive.read(byteorder) != b"little":
                raise Refused("tensors in big-endian order; expected little")
        self._entries = {entry.filename: entry for entry in entries}
        self._size = path.stat().st_size
        self._mapped = torch.UntypedStorage.from_file(str(path), False, self._size)
        self._storages: dict[str, torch.UntypedStorage] = {}

    def storage(self, key: str) -> torch.UntypedStorage:
        """The bytes of storage `key`."""
        if key not in self._storages:
            entry = self._entries.get(f"{self._root}data/{key}")
            if entry is None:
                raise Refused(f"no entry for storage {key!r}")
            start = self._data_offset(entry)
            if start + entry.file_size > self._size:
                raise Refused(f"storage {key!r} ends past the end of the file")
            self._storages[key] = self._mapped[start : start + entry.file_size]
        return self._storages[key]

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        # The local header's extra field, torch's padding, has another length than the central directory's.
        with self.path.open("rb") as handle:
            handle.seek(entry.header_offset)
            header = handle.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise Refused(f"no local header of {entry.filename!r}")
        return (
            entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )

    @staticmethod
    def _check(entries: list[zipfile.ZipInfo]) -> None:
        counts = Counter(entry.filename for entry in entries)
        faults = [f"entry {name!r} {count} times" for name, count in counts.items() if count > 1]
        for entry in entries:
            parts = PurePosixPath(entry.filename.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts or ":" in entry.filename:
                faults.append(f"entry {entry.filename!r} outside of the archive")
            if entry.compress_type != zipfile.ZIP_STORED:
                faults.append(f"entry {entry.filename!r} compressed; torch.save stores entries as they are")
        if faults:
            raise Refused("; ".join(faults))
