"""Painted frames into files: segments of a few frames, then joined, with the source's sound, when all are painted."""

from __future__ import annotations

import contextlib
import heapq
import io
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from lsast_engines.errors import PictureError, UsageError
from lsast_engines.images import import_opencv, on_white

from ..images.formats import ANIMATIONS, WRITTEN_VIDEOS, video_format
from .source import Frame, Source, filtered, opened, pyav, start_of

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer

_BT709, _LIMITED_RANGE = 1, 1
_CPU_AVX512_SKX = 256
"""OpenCV's number of the AVX-512 instructions that x264 uses (cvdef.h)."""


def output_format(source: Path, out: Path) -> str:
    """`video_format`; a `UsageError` for a suffix that does not hold the frames of `source`."""
    if form := video_format(source, out):
        return form
    kinds = sorted({*WRITTEN_VIDEOS, *ANIMATIONS} - {".png"})
    raise UsageError(f"found the output {out}; expected a name that ends in {', '.join(kinds)}")


def is_animation(form: str) -> bool:
    """Whether a format is that of an animated picture: it keeps opacity and has no sound."""
    return form in ANIMATIONS.values()


def check_sound(source: Path, out: Path, form: str) -> None:
    """Raise a `PictureError` if `out` cannot hold the sound of `source`."""
    av = pyav()
    with opened(source) as heard:
        try:
            with av.open(io.BytesIO(), "w", format=form) as trial:
                sounds = _sound_streams(heard, trial)
                if sounds:
                    trial.start_encoding()
                for packet in islice(_sound_packets(heard, sounds), 8):
                    trial.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            names = ", ".join(sorted({stream.codec_context.name for stream in heard.streams.audio}))
            raise PictureError(
                f"{out} cannot hold the sound of {source} ({names}: {error}); try a name that ends in .mkv, "
                "which holds any sound"
            ) from error


def _sound_streams(heard: InputContainer, output: OutputContainer) -> dict[int, Any]:
    """A stream in the output for each sound of the source, by its number there; of FLAC if Matroska cannot copy it."""
    streams: dict[int, Any] = {}
    for stream in heard.streams.audio:
        try:
            streams[stream.index] = output.add_stream_from_template(stream)
        except ValueError:
            if output.format.name != "matroska":
                raise
            streams[stream.index] = output.add_stream("flac", rate=stream.rate, layout=stream.layout)
            streams[stream.index].format = "s32" if "s32" in stream.format.name else "s16"
    return streams


def _sound_packets(heard: InputContainer, streams: dict[int, Any]) -> Iterator[Any]:
    """The packets of the source's sound for `streams`, in the time bases of these, from the start of the source on."""
    return _increasing(_copied_or_encoded(heard, streams), start_of(heard)) if streams else iter(())


def _copied_or_encoded(heard: InputContainer, streams: dict[int, Any]) -> Iterator[Any]:
    av = pyav()
    resamplers = {
        index: av.AudioResampler(stream.format, stream.layout, stream.rate, stream.codec_context.frame_size or 4096)
        for index, stream in streams.items()
        if stream.codec_context is not None and stream.codec_context.is_encoder
    }
    for packet in _until_damaged(heard.demux(*heard.streams.audio)):
        stream = streams[packet.stream.index]
        if packet.stream.index not in resamplers:
            if packet.size:
                packet.stream = stream
                yield packet
            continue
        resampler = resamplers[packet.stream.index]
        with contextlib.suppress(av.InvalidDataError):
            for frame in packet.decode():
                for part in resampler.resample(frame):
                    yield from stream.encode(part)
        if not packet.size:  # the last
            for part in (*resampler.resample(None), None):
                yield from stream.encode(part)


def _until_damaged(packets: Iterator[Any]) -> Iterator[Any]:
    with contextlib.suppress(pyav().FFmpegError):  # damaged, or cut off as the pictures are
        yield from packets


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Name the output in errors of the block, which reads no source: each becomes a `PictureError`."""
    try:
        yield
    except (OSError, pyav().FFmpegError, ValueError) as error:
        # PyAV wraps what a file object raises.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise PictureError(
            f"cannot write {out} ({reason}); expected a writable folder with room: the same call then goes on"
        ) from error


class SegmentEncoder:
    """Encodes painted frames into a segment, each with the time of its source."""

    def __init__(self, source: Source, *, lossless: bool) -> None:
        self._source, self._lossless = source, lossless
        self._buffer = io.BytesIO()
        self._container = pyav().open(self._buffer, "w", format="nut")  # NUT keeps any time base
        self._stream: Any = None

    def add(self, painting: Image.Image, source: Frame) -> bool:
        """Encode the painting of a frame; whether transparency was composited on white."""
        pixels, is_flat = np.asarray(painting), False
        if pixels.shape[2] == 4 and not self._lossless:
            is_flat = bool((pixels[:, :, 3] < 255).any())
            pixels = on_white(pixels[:, :, :3], pixels[:, :, 3])
        if self._stream is None:
            self._stream = self._new_stream(pixels, source)
        frame = pyav().VideoFrame.from_ndarray(
            np.ascontiguousarray(pixels), format="rgba" if pixels.shape[2] == 4 else "rgb24"
        )
        if not self._lossless:
            frame = frame.reformat(format=self._stream.pix_fmt, dst_colorspace="itu709", dst_color_range="MPEG")
        frame.pts, frame.time_base = source.start, self._source.time_base
        self._container.mux(self._stream.encode(frame))
        return is_flat

    def finish(self) -> bytes:
        """The segment."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()

    def _new_stream(self, pixels: np.ndarray[Any, Any], source: Frame) -> Any:
        height, width, channels = pixels.shape
        if self._lossless:
            stream: Any = self._container.add_stream("png", rate=self._source.rate)
            stream.pix_fmt = "rgba" if channels == 4 else "rgb24"
        else:
            # x264's AVX-512 code of the macroblock tree (mbtree_propagate_list) takes 8 macroblocks at a time and
            # reads what lies beyond a row of another width: the same frames gave other bytes at times. AVX2 does not.
            asm = {"x264-params": "asm=avx2"} if import_opencv().checkHardwareSupport(_CPU_AVX512_SKX) else {}
            stream = self._container.add_stream("libx264", rate=self._source.rate, options={"crf": "17", **asm})
            stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"  # 4:2:0 needs even sides
        stream.width, stream.height = width, height
        context = stream.codec_context
        context.time_base = self._source.time_base
        context.thread_count = 1  # otherwise the bytes depend on the number of processors
        if not self._lossless:
            context.max_b_frames = 0  # so packets come in the order of display, and segments join as they are
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
            if source.pixels.shape[:2] == (height, width):
                context.sample_aspect_ratio = self._source.sample_aspect
        return stream


_MOST_PLAYS = 65535
"""WebP's, and FFmpeg's for PNG; GIF holds one more."""


def join(segments: list[Path], last: Fraction, source: Path, handle: BinaryIO, form: str, plays: int) -> None:
    """Write the segments of `SegmentEncoder`, and of a video the source's sound, into one file, by time. `last` is how
    long the last frame is shown, in seconds, 0 if that is not known; `plays` is `Source.plays`."""
    if is_animation(form):
        write = _join_webp if form == "webp" else _join_animation
        write((frame for part in _containers(segments) for frame in part.decode(video=0)), last, handle, form, plays)
        return
    av = pyav()
    with contextlib.ExitStack() as stack:
        heard = None if source.suffix.lower() in ANIMATIONS else stack.enter_context(opened(source))
        first = stack.enter_context(av.open(f"file:{segments[0]}"))
        joined = stack.enter_context(av.open(handle, "w", format=form))
        pictures = joined.add_stream_from_template(first.streams.video[0])
        sounds = _sound_streams(heard, joined) if heard else {}
        joined.start_encoding()  # only now the time bases of the output are known

        def picture_packets() -> Iterator[Any]:
            painted = (packet for part in _containers(segments) for packet in part.demux(video=0) if packet.size)
            for packet, following in pairwise(chain(painted, [None])):
                if following is None:
                    packet.duration = round(last / packet.time_base)
                packet.stream = pictures
                yield packet

        merged = heapq.merge(
            _increasing(picture_packets(), Fraction(0)),
            _sound_packets(heard, sounds) if heard else iter(()),
            key=lambda packet: packet.dts * packet.time_base,
        )
        for packet in merged:
            joined.mux(packet)


def _increasing(packets: Iterator[Any], start: Fraction) -> Iterator[Any]:
    """The packets in the time bases of their streams, `start` seconds earlier, none without a time or twice at one."""
    last: dict[int, int] = {}
    for packet in packets:
        old, new = packet.time_base, packet.stream.time_base

        dts, pts = (None if ticks is None else round((ticks * old - start) / new) for ticks in (packet.dts, packet.pts))
        duration = round((packet.duration or 0) * old / new)
        before = last.get(packet.stream.index)
        found = dts if dts is not None else pts
        if found is None:
            found = 0 if before is None else before + max(1, duration)
        if before is not None and found <= before:
            found = before + 1
        last[packet.stream.index] = packet.dts = found
        packet.pts = found if pts is None else max(pts, found)
        packet.duration, packet.time_base = duration, new
        yield packet


def _containers(segments: list[Path]) -> Iterator[Any]:
    for segment in segments:
        with pyav().open(f"file:{segment}") as container:  # so that no name is taken for an address
            yield container


def _join_animation(frames: Iterator[Any], last: Fraction, handle: BinaryIO, form: str, plays: int) -> None:
    """Write a GIF or an animated PNG."""
    unit, delay, options = Fraction(1, 1000), f"{float(last):.3f}", {"plays": str(min(plays, _MOST_PLAYS))}
    pixels = "rgba"
    if form == "gif":
        unit, delay, pixels, frames = Fraction(1, 100), str(max(2, round(last * 100))), "pal8", _with_palette(frames)
        # FFmpeg's number of repetitions: -1 is none, 0 no end.
        options = {"loop": str(min(plays - 1, _MOST_PLAYS) or -1) if plays else "0"}
    options |= {"final_delay": delay} if last else {}
    with pyav().open(handle, "w", format=form, options=options) as joined:
        stream: Any = None
        start = -1
        for frame in frames:
            if stream is None:
                stream = joined.add_stream(form, rate=1 / unit)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pixels
                stream.codec_context.time_base = unit
                stream.codec_context.thread_count = 1
            start = max(round(frame.pts * frame.time_base / unit), start + 1)
            painted = frame if form == "gif" else frame.reformat(format=pixels)
            painted.pts, painted.time_base = start, unit
            joined.mux(stream.encode(painted))
        joined.mux(stream.encode(None))


def _join_webp(frames: Iterator[Any], last: Fraction, handle: BinaryIO, form: str, plays: int) -> None:
    """Write an animated WebP by Pillow, which takes all frames at once: FFmpeg's loses the duration of the last."""
    starts, images = [], []
    for frame in frames:
        starts.append(round(frame.pts * frame.time_base * 1000))
        images.append(Image.fromarray(frame.to_ndarray()))
    durations = [later - start for start, later in pairwise(starts)]
    durations.append(round(last * 1000) or (durations or [100])[-1])
    first, *others = images
    shown = {"duration": durations, "loop": min(plays, _MOST_PLAYS)}
    first.save(handle, form, save_all=True, append_images=others, **shown, quality=95)


def _with_palette(frames: Iterator[Any]) -> Iterator[Any]:
    """The frames in 256 colours, each with its own palette, by FFmpeg's filters."""
    first = next(frames)
    graph = pyav().filter.Graph()
    buffer = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=first.time_base)
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1"), graph.add("buffersink")
    graph.link_nodes(buffer, split, use, sink)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    yield from filtered(graph, chain([first], frames))
