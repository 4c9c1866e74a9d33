"""Videos, frame by frame through PyAV: sound is copied, timestamps are kept, memory does not grow with the length.

Frames are painted in order and encoded in segments of `SEGMENT` frames. The segments, and what the next frame needs,
are stored in a hidden folder beside OUT until the video is finished. So the same call continues one that was stopped,
after its last whole segment, and gives the same video.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsast_engines.errors import PictureError, UsageError, shown
from lsast_engines.files import replace_file

from ..images.formats import ANIMATIONS, check_format
from ..result import validate_output_place
from .optical_flow import TemporalState
from .source import Frame, open_source, pyav
from .unfinished import Unfinished
from .writing import OutputFormat, SegmentEncoder, check_sound, join, output_format, writing

if TYPE_CHECKING:
    from ..result import Result
    from ..stylizer import OnStep, Stylizer

SEGMENT = 24
"""Frames that are encoded together; so many are lost at most when a run is killed."""

_log = logging.getLogger("lsast.video")


def check_video(source: Path, out: Path) -> None:
    """Check, before anything is painted, that `source` is a video and that `out` can hold it.

    Raises:
        UsageError: the suffix of `out` is not written, or `out` is a folder or the source itself.
        MissingExtraError: PyAV is not installed.
        PictureError: the source cannot be read or has no pictures, or `out` cannot be written or cannot hold its sound.
    """
    form = output_format(source, out)
    validate_output_place(out)
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"found {out} as both IN and OUT; expected another name: a video is read while it is written")
    facts = source.stat() if source.exists() else None
    _check_content(source, out, form, facts and (facts.st_size, facts.st_mtime_ns))


@functools.lru_cache(maxsize=256)
def _check_content(source: Path, out: Path, form: OutputFormat, _: object) -> None:
    """Decode the first frame and copy the first sound; what stays as it is is not checked again."""
    with open_source(source) as video:
        first = next(video.frames(), None)
        if first is None:
            raise PictureError(f"found no frame in {source}; expected a video")
        if out.suffix.lower() == ".webp":
            check_format(out, (first.pixels.shape[1], first.pixels.shape[0]))
    if not form.is_animation and source.suffix.lower() not in ANIMATIONS:
        check_sound(source, out, form)


def paint_video(
    source: Path,
    out: Path,
    stylizer: Stylizer,
    options: Mapping[str, Any],
    on_step: OnStep | None = None,
    on_frame: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Paint the first picture stream of a video, or an animated picture; sound is copied.

    Args:
        source: the video, or the animated GIF, WebP or PNG.
        out: the file to write, H.264 in the format of its suffix, or an animated picture: whole or not at all,
            replacing an existing file.
        stylizer: paints.
        options: options of `Stylizer.stylize`.
        on_step: see `Stylizer.stylize`; called for every frame.
        on_frame: called with the number of frames done and the number there are, if known, before the first frame and
            after each.

    Returns:
        `frames` of the video, `resumed` of them painted by an earlier run, and the `result` of the last frame.

    Raises:
        UsageError, MissingExtraError, PictureError: see `check_video`; or another run paints `out`.
        LsastError: see `Stylizer.stylize`.
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
                encoder = SegmentEncoder(video, lossless=form.is_animation)
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
    mask = options.get("mask")
    plain = {name: value for name, value in options.items() if name != "mask"}
    provenance = stylizer.provenance(first.pixels, mask=mask, **plain)
    known = [str(source.resolve()), facts.st_size, facts.st_mtime_ns, pyav().__version__, asdict(provenance),
             asdict(stylizer.resolve(**plain))]  # fmt: skip
    return hashlib.sha256(json.dumps(known, default=str).encode("utf-8", "surrogatepass")).hexdigest()
