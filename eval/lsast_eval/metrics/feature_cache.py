"""Feature vectors of pictures, cached on disk by the SHA-256 of the picture file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lsast_engines.files import file_sha256, replace_file
from lsast_engines.images import read_on_white

if TYPE_CHECKING:
    from .efficientnet import EffNetLite

log = logging.getLogger("lsast.eval")


class FeatureCache:
    """Feature vectors of one network: a small file in `folder` for each picture, computed `batch` at a time."""

    def __init__(self, network: EffNetLite, folder: Path, batch: int = 16, progress: bool = True) -> None:
        self._network, self._batch, self._progress = network, batch, progress
        self._folder = folder / network.key
        self._hashes: dict[Path, str] = {}

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, read once in the life of the store."""
        if path not in self._hashes:
            self._hashes[path] = file_sha256(path)
        return self._hashes[path]

    def vectors(self, paths: Sequence[Path]) -> npt.NDArray[np.float32]:
        """A vector for each path, [N, D].

        Raises:
            PictureError: one of the files is no picture.
        """
        known = {digest: self._read(digest) for digest in {self.digest(path) for path in paths}}
        missing = {self.digest(path): path for path in paths if known[self.digest(path)] is None}
        items = list(missing.items())
        with tqdm(
            total=len(items), desc="features", unit="picture", leave=False, disable=None if self._progress else True
        ) as bar:
            for begin in range(0, len(items), self._batch):
                part = items[begin : begin + self._batch]
                prepared = np.stack([self._network.prepare(read_on_white(path)) for _, path in part])
                for (digest, _), vector in zip(part, self._network.features(prepared), strict=True):
                    known[digest] = vector
                    with replace_file(self._file(digest)) as handle:
                        np.save(handle, vector, allow_pickle=False)
                bar.update(len(part))
        return np.stack([vector for path in paths if (vector := known[self.digest(path)]) is not None])

    def _file(self, digest: str) -> Path:
        return self._folder / digest[:2] / f"{digest}.npy"

    def _read(self, digest: str) -> npt.NDArray[np.float32] | None:
        path = self._file(digest)
        try:
            vector = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, OSError) as error:
            log.warning("computing again what %s should hold (%s)", path, error)
            return None
        return np.asarray(vector, dtype=np.float32)
