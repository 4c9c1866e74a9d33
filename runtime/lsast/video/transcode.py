"""Videos, frame by frame through PyAV: sound is copied, timestamps are kept, memory does not grow with the length.

Frames are painted in order and encoded in segments of `SEGMENT` frames. The segments, and what the next frame needs,
are stored in a hidden folder beside OUT until the video is finished. So the same call continues one that was stopped,
after its last whole segment, and gives the same video.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lsast_engines.errors import PictureError, UsageError, shown
from lsast_engines.files import is_own, lock_file, make_folder, replace_file

from ..images.formats import ANIMATIONS, check_format
from ..result import validate_output_place
from .optical_flow import TemporalState
from .source import Frame, open_source, pyav
from .writing import SegmentEncoder, check_sound, is_animation, join, output_format, writing

if TYPE_CHECKING:
    from ..result import Result
    from ..stylizer import OnStep, Stylizer

SEGMENT = 24
"""Frames that are encoded together; so many are lost at most when a run is killed."""

_STATE, _LOCK = "state.npz", "lock"

_log = logging.getLogger("lsast.video")


def check_video(source: Path, out: Path) -> None:
    """Check, before anything is painted, that `source` is a video and that `out` can hold it. Raises a `UsageError`
    where `out` is the source, and as `output_format`, `validate_output_place`, `open_source` and `check_sound` do."""
    form = output_format(source, out)
    validate_output_place(out)
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"found {out} as both IN and OUT; expected another name: a video is read while it is written")
    with open_source(source) as video:
        first = next(video.frames(), None)
        if first is None:
            raise PictureError(f"found no frame in {source}; expected a video")
        if form == "webp":
            check_format(out, (first.pixels.shape[1], first.pixels.shape[0]))
    if not is_animation(form) and source.suffix.lower() not in ANIMATIONS:
        check_sound(source, out, form)


def paint_video(
    source: Path,
    out: Path,
    stylizer: Stylizer,
    options: Mapping[str, Any],
    on_step: OnStep | None = None,
    on_frame: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Paint the first picture stream of a video, or an animated GIF, WebP or PNG; sound is copied. `out` is written
    whole or not at all, as H.264 in the format of its suffix, or as an animated picture. Errors as of `check_video`
    and `Stylizer.stylize`, whose keywords are `options`.

    Args:
        on_step: see `Stylizer.stylize`; called for every frame.
        on_frame: called with the number of frames done and the number there are, if known, before the first frame and
            after each.

    Returns:
        `frames` of the video, `resumed` of them painted by an earlier run, and the `result` of the last frame.
    """
    check_video(source, out)
    form = output_format(source, out)
    finished = is_flat = False
    result: Result | None = None
    with open_source(source) as video:
        frames = video.frames()
        first = next(frames)
        unfinished = Unfinished(out, _key(source, first, stylizer, options))
        try:
            temporal = TemporalState()
            temporal.restore(unfinished.temporal)
            done = resumed = unfinished.frames
            if on_frame:
                on_frame(done, video.count)
            # Decoding again is cheap beside painting, and exact, which seeking may not be.
            frames = islice(chain([first], frames), done, None)
            while (head := next(frames, None)) is not None:
                encoder = SegmentEncoder(video, lossless=is_animation(form))
                for frame in chain([head], islice(frames, SEGMENT - 1)):
                    [result] = stylizer.stylize_frames([frame.pixels], temporal=temporal, on_step=on_step, **options)
                    with writing(out):
                        is_flat |= encoder.add(result.image, frame)
                    done += 1
                    if on_frame:
                        on_frame(done, video.count)
                with writing(out):
                    unfinished.save(encoder.finish(), done, frame.duration, temporal.state())
            if is_flat:
                _log.warning("%s: the format has no transparency; the painting is composited on white", shown(out))
            with writing(out), replace_file(out) as handle:
                last = unfinished.last_duration * video.time_base
                join(unfinished.segments(), last, source, handle, form, video.plays)
            finished = True
        finally:
            unfinished.close(finished=finished)
    return {"frames": done, "resumed": resumed, "result": result}


def _key(source: Path, first: Frame, stylizer: Stylizer, options: Mapping[str, Any]) -> str:
    """A hash of everything that a painted segment depends on."""
    facts = source.stat()
    provenance = stylizer.provenance(first.pixels, **options)
    known = [str(source.resolve()), facts.st_size, facts.st_mtime_ns, pyav().__version__, asdict(provenance),
             asdict(stylizer.resolve(**options))]  # fmt: skip
    return hashlib.sha256(json.dumps(known, default=str).encode("utf-8", "surrogatepass")).hexdigest()


class Unfinished:
    """What is kept of a video while it is painted, in a hidden folder beside OUT, which one run at a time uses."""

    def __init__(self, out: Path, key: str) -> None:
        """Take the folder, and what a run with the same `key` left in it; a `PictureError` if another run uses it, or
        it cannot be written."""
        name = f".{out.name}.parts"
        if len(os.fsencode(name)) > 255:
            name = f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()}.parts"
        self._out, self._folder, self._key = out, out.with_name(name), key
        self._digests: list[str] = []
        self.frames = 0
        self.last_duration = 0
        """`Frame.duration` of the last of these."""
        self.temporal: dict[str, Any] = {}
        self._descriptor = self._take()
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def save(self, segment: bytes, frames: int, last_duration: int, temporal: dict[str, Any]) -> None:
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
        # Another user may turn what is in a folder into links, to have our files written over.
        if self._folder.is_symlink() or not is_own(self._folder):
            raise PictureError(
                f"found {self._folder}, a link or a folder of another user; expected no such name: remove it"
            )
        try:
            make_folder(self._folder)
            descriptor = lock_file(self._folder / _LOCK)
        except OSError as error:
            raise PictureError(f"cannot write {self._out} ({error}); expected a writable folder") from error
        if descriptor < 0:
            raise PictureError(f"{self._out} is being painted by another run; wait for it, or take another OUT")
        return descriptor

    def _load(self) -> None:
        """Read what an earlier run left; throw it away, with a word, if it is damaged or of another painting."""
        left = [entry for entry in self._folder.iterdir() if entry.name != _LOCK]
        reason = "it is damaged, or of another version"
        with contextlib.suppress(Exception):  # a damaged archive raises many types
            with (self._folder / _STATE).open("rb") as handle, np.load(handle) as found:
                facts = json.loads(str(found["facts"]))
                temporal = {name: found[name] for name in found.files if name != "facts"}
            self._digests = list(facts["segments"])
            if facts["key"] != self._key:
                reason = "it is of another video, or of other options, styles or versions"
            elif self._digests == [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.segments()]:
                self.frames, self.last_duration, self.temporal = facts["frames"], facts["last_duration"], temporal
                return
        self._digests = []
        if left:
            _log.warning("%s: the unfinished painting is thrown away: %s", shown(self._out), reason)
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
