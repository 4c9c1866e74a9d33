"""Videos, frame by frame through PyAV: sound is copied, timestamps are kept, memory does not grow with the length.

Frames are painted in order and encoded in segments of `SEGMENT` frames. The segments, and what the next frame needs,
are stored in a hidden folder beside OUT until the video is finished. So the same call continues one that was stopped,
after its last whole segment, and gives the same video.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from lsast_engines.errors import MissingExtraError, PictureError, UsageError
from lsast_engines.files import replace_file

from ..images.canvas import Pixels
from ..images.formats import WRITTEN_VIDEOS
from .optical_flow import TemporalState

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from ..result import Result
    from ..stylizer import OnStep, Stylizer

SEGMENT = 24
"""Frames that are encoded together; so many are lost at most when a run is killed."""

_FORMATS = {".m4v": "mp4", ".mkv": "matroska", ".mov": "mov", ".mp4": "mp4"}
_BT709, _LIMITED_RANGE, _UNSPECIFIED = 1, 1, 2
_CPU_AVX512_SKX = 256
"""OpenCV's number of the AVX-512 instructions that x264 uses (cvdef.h)."""


def check_video(source: Path, out: Path) -> None:
    """Check, before anything is painted, that `source` is a video and that `out` can hold its sound.

    Raises:
        UsageError: the suffix of `out` is not written, or `out` is a folder or the source itself.
        MissingExtraError: PyAV is not installed.
        PictureError: the source cannot be read or has no pictures, or OUT cannot hold its sound.
    """
    if out.suffix.lower() not in WRITTEN_VIDEOS:
        raise UsageError(f"found the output {out}; expected a name that ends in {', '.join(sorted(WRITTEN_VIDEOS))}")
    if out.is_dir():
        raise UsageError(f"found the folder {out} as output; expected the name of a file")
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"found {out} as both IN and OUT; expected another name: a video is read while it is written")
    with _opened(source) as container:
        if not container.streams.video:
            raise PictureError(f"found no picture in {source}; expected a video")
        trial_file = out.with_name(f".{out.name}.check")
        try:
            trial_file.parent.mkdir(parents=True, exist_ok=True)
            with _av().open(str(trial_file), "w", format=_FORMATS[out.suffix.lower()]) as trial:
                for stream in container.streams.audio:
                    trial.add_stream_from_template(stream)
                if container.streams.audio:
                    trial.start_encoding()
        except (OSError, ValueError) as error:
            sound = ", ".join(sorted({stream.codec_context.name for stream in container.streams.audio}))
            raise PictureError(
                f"{out} cannot be written with the sound of {source} ({sound or 'none'}: {error}); expected a writable "
                "folder, or try a name that ends in .mkv, which holds any sound"
            ) from error
        finally:
            trial_file.unlink(missing_ok=True)


def paint_video(
    source: Path,
    out: Path,
    stylizer: Stylizer,
    options: Mapping[str, Any],
    on_step: OnStep | None = None,
    on_frame: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Paint the first picture stream of a video; its sound is copied.

    Args:
        source: the video.
        out: the video to write, H.264 in the format of its suffix: whole or not at all, replacing an existing file.
        stylizer: paints.
        options: options of `Stylizer.stylize`.
        on_step: see `Stylizer.stylize`; called for every frame.
        on_frame: called with the number of frames done and the number there are, if known, before the first frame and
            after each.

    Returns:
        `frames` of the video, `resumed` of them painted by an earlier run, and the `result` of the last frame.

    Raises:
        UsageError, MissingExtraError, PictureError: see `check_video`.
        LsastError: see `Stylizer.stylize`.
    """
    check_video(source, out)
    work = _Work(out, _key(source, stylizer, options))
    temporal = TemporalState()
    temporal.restore(work.temporal)
    done = resumed = work.frames
    result: Result | None = None
    with _opened(source) as container:
        stream = container.streams.video[0]
        total = stream.frames or None
        if on_frame:
            on_frame(done, total)
        # Decoding the frames again is cheap beside painting, and exact, which seeking may not be.
        frames = islice(container.decode(stream), done, None)
        while (first := next(frames, None)) is not None:
            with work.new_segment() as handle, contextlib.closing(_Encoder(handle, stream)) as encoder:
                for frame in chain([first], islice(frames, SEGMENT - 1)):
                    [result] = stylizer.stylize_frames([_rgb(frame)], temporal=temporal, on_step=on_step, **options)
                    encoder.add(np.asarray(result.image.convert("RGB")), frame)
                    done += 1
                    if on_frame:
                        on_frame(done, total)
            work.save(done, temporal.state())
    if done == 0:
        raise PictureError(f"found no frame in {source}; expected a video")
    with replace_file(out) as handle:
        _join(work.segments(), source, handle, _FORMATS[out.suffix.lower()])
    work.clear()
    return {"frames": done, "resumed": resumed, "result": result}


class _Work:
    """The segments of a video that is being painted, and the temporal state after the last."""

    def __init__(self, out: Path, key: str) -> None:
        self._folder = out.with_name(f".{out.name}.parts")
        self._key = key
        self._count = 0
        self.frames = 0
        self.temporal: dict[str, np.ndarray[Any, Any]] = {}
        if (state := self._folder / "state.npz").is_file():
            with np.load(state) as found:
                if str(found["key"]) == key:
                    self.frames, self._count = int(found["frames"]), int(found["segments"])
                    self.temporal = {name: found[name] for name in ("content", "latent", "painted") if name in found}
        if self._count == 0:
            self.clear()  # nothing, or another video, or other options

    @contextlib.contextmanager
    def new_segment(self) -> Iterator[Any]:
        """A file for the next segment."""
        with replace_file(self._folder / f"{self._count:06}.nut") as handle:
            yield handle
        self._count += 1

    def save(self, frames: int, temporal: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Store the number of frames and the temporal state after the last segment."""
        with replace_file(self._folder / "state.npz") as handle:
            arrays: dict[str, Any] = {"key": self._key, "frames": frames, "segments": self._count, **temporal}
            np.savez(handle, **arrays)

    def segments(self) -> list[Path]:
        """All segments, in order."""
        return [self._folder / f"{index:06}.nut" for index in range(self._count)]

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)


class _Encoder:
    """Encodes painted frames into a segment, each with the time of its source."""

    def __init__(self, handle: Any, like: VideoStream) -> None:
        self._container: OutputContainer = _av().open(handle, "w", format="nut")  # NUT keeps any time base
        self._rate = like.average_rate or Fraction(25)
        self._time_base = like.time_base or 1 / self._rate
        self._stream: Any = None

    def add(self, rgb: Pixels, source: VideoFrame) -> None:
        """Encode the painting [H, W, 3] of a frame."""
        if self._stream is None:
            self._stream = self._new_stream(rgb.shape[1], rgb.shape[0])
        frame = _av().VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        frame = frame.reformat(format=self._stream.pix_fmt, dst_colorspace="itu709", dst_color_range="MPEG")
        frame.pts, frame.time_base = source.pts, source.time_base
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds."""
        with self._container:
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))

    def _new_stream(self, width: int, height: int) -> Any:
        # x264's AVX-512 code of the macroblock tree (mbtree_propagate_list) takes 8 macroblocks at a time and reads
        # what lies beyond a row of another width: the same frames gave other bytes at times. AVX2 has no such fault.
        asm = {"x264-params": "asm=avx2"} if cv2.checkHardwareSupport(_CPU_AVX512_SKX) else {}
        stream: Any = self._container.add_stream("libx264", rate=self._rate, options={"crf": "17", **asm})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"  # 4:2:0 needs even sides
        context = stream.codec_context
        context.time_base = self._time_base
        context.thread_count = 1  # otherwise the bytes depend on the number of processors
        context.max_b_frames = 0  # so packets come in the order of display, and segments join as they are
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        return stream


def _join(segments: list[Path], source: Path, handle: Any, name: str) -> None:
    """Write the packets of the segments and of the source's sound into one file, by time."""
    av = _av()
    with _opened(source) as heard, av.open(str(segments[0])) as first, av.open(handle, "w", format=name) as joined:
        pictures = joined.add_stream_from_template(first.streams.video[0])
        sounds = {stream.index: joined.add_stream_from_template(stream) for stream in heard.streams.audio}

        def picture_packets() -> Iterator[Packet[Any]]:
            for segment in segments:
                with av.open(str(segment)) as container:
                    for packet in container.demux(video=0):
                        if packet.dts is not None:
                            packet.stream = pictures
                            yield packet

        def sound_packets() -> Iterator[Packet[Any]]:
            for packet in heard.demux(*heard.streams.audio) if sounds else ():
                if packet.dts is not None:
                    packet.stream = sounds[packet.stream.index]
                    yield packet

        by_time = heapq.merge(
            picture_packets(), sound_packets(), key=lambda packet: (packet.dts or 0) * packet.time_base
        )
        for packet in by_time:
            joined.mux(packet)


def _rgb(frame: VideoFrame) -> Pixels:
    """The frame as it is displayed, [H, W, 3]."""
    # By convention of all players untagged high definition is BT.709; the converter takes it for BT.601.
    untagged = frame.colorspace == _UNSPECIFIED and frame.height >= 720
    rgb = frame.to_ndarray(format="rgb24", src_colorspace="itu709" if untagged else None)
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)), dtype=np.uint8)


def _key(source: Path, stylizer: Stylizer, options: Mapping[str, Any]) -> str:
    """A hash of everything that a painted segment depends on."""
    facts = source.stat()
    known = [str(source.resolve()), facts.st_size, facts.st_mtime_ns, stylizer.bundle.manifest.fingerprint,
             sorted((name, repr(value)) for name, value in options.items())]  # fmt: skip
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[InputContainer]:
    av = _av()
    try:
        with av.open(str(source)) as container:
            yield container
    except av.FFmpegError as error:
        if isinstance(error, FileNotFoundError):
            raise PictureError(f"found no file {source}; expected a video") from None
        raise PictureError(f"{source} cannot be read as a video ({error})") from error


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "video") from None
    return av
