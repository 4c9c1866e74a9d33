"""What is kept of a video while it is painted: encoded segments, and what the next frame needs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lsast_engines.errors import PictureError, shown
from lsast_engines.files import is_own, make_folder, replace_file, try_lock

_STATE, _LOCK = "state.npz", "lock"
_LONGEST_NAME = 255
_TRIES = 100
"""A folder that cannot be made looks as if another run had just removed it, e.g. in /proc."""

_log = logging.getLogger("lsast.video")

Arrays = dict[str, np.ndarray[Any, Any]]


class Unfinished:
    """A hidden folder beside OUT, which one run at a time uses."""

    def __init__(self, out: Path, key: str) -> None:
        """Take the folder, and what a run with the same `key` left in it.

        Raises:
            PictureError: another run uses it, or it cannot be written.
        """
        name = f".{out.name}.parts"
        if len(os.fsencode(name)) > _LONGEST_NAME:
            name = f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()}.parts"
        self._out, self._folder, self._key = out, out.with_name(name), key
        self._digests: list[str] = []
        self.frames = 0
        """Number of frames in the segments."""
        self.last_duration = 0
        """`Frame.duration` of the last of these."""
        self.temporal: Arrays = {}
        """See `TemporalState.state`."""
        self._descriptor = self._take()
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def save(self, segment: bytes, frames: int, last_duration: int, temporal: Arrays) -> None:
        """Add a segment; the other arguments are `frames`, `last_duration` and `temporal` after it."""
        with replace_file(self._folder / f"{len(self._digests):06}.nut") as handle:
            handle.write(segment)
        self._digests.append(hashlib.sha256(segment).hexdigest())
        self.frames, self.last_duration = frames, last_duration
        facts = {"key": self._key, "frames": frames, "last_duration": last_duration, "segments": self._digests}
        with replace_file(self._folder / _STATE) as handle:
            arrays: dict[str, Any] = {"facts": np.array(json.dumps(facts)), **temporal}
            np.savez(handle, **arrays)

    def segments(self) -> list[Path]:
        """All segments, in order."""
        return [self._folder / f"{index:06}.nut" for index in range(len(self._digests))]

    def close(self, *, finished: bool = False) -> None:
        """Let another run take the folder; remove it if the video is finished or nothing is in it yet."""
        if finished or not self._digests:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take(self) -> int:
        for left in reversed(range(_TRIES)):
            # Another user may turn what is in a folder into links, to have our files written over.
            if self._folder.is_symlink() or not is_own(self._folder):
                raise PictureError(
                    f"found {self._folder}, a link or a folder of another user; expected no such name: remove it"
                )
            try:
                make_folder(self._folder)
                descriptor = os.open(self._folder / _LOCK, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except OSError as error:
                if left and isinstance(error, FileNotFoundError):  # another run has just finished
                    continue
                raise PictureError(f"cannot write {self._out} ({error}); expected a writable folder") from error
            if not try_lock(descriptor):
                os.close(descriptor)
                raise PictureError(f"{self._out} is being painted by another run; wait for it, or take another OUT")
            try:
                if os.path.samestat(os.fstat(descriptor), os.stat(self._folder / _LOCK)):
                    return descriptor
            except FileNotFoundError:
                pass
            os.close(descriptor)
        raise PictureError(f"cannot write {self._out}: others remove what is unfinished of it; take another OUT")

    def _load(self) -> None:
        """Read what an earlier run left; throw it away, with a word, if it is damaged or of another painting."""
        left = [entry for entry in self._folder.iterdir() if entry.name != _LOCK]
        try:
            with (self._folder / _STATE).open("rb") as handle, np.load(handle) as found:
                facts = json.loads(str(found["facts"]))
                temporal = {name: found[name] for name in found.files if name != "facts"}
            reason = "it is of another video, or of other options, styles or versions" * (facts["key"] != self._key)
            if not reason:
                self._digests, self.frames = list(facts["segments"]), int(facts["frames"])
                self.last_duration = int(facts["last_duration"])
                self.temporal = temporal
                if self._digests == [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.segments()]:
                    _remove(entry for entry in left if entry not in (*self.segments(), self._folder / _STATE))
                    return
                reason = "a segment is damaged"
        except FileNotFoundError:
            reason = "a file is missing"
        except Exception:  # a damaged archive raises many types
            reason = "its state is damaged, or of another version"
        self._digests, self.frames, self.last_duration, self.temporal = [], 0, 0, {}
        if left:
            _log.warning("%s: the unfinished painting is thrown away: %s", shown(self._out), reason)
            _remove(left)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
