"""The frames of a video or an animated picture as they are displayed: upright, in SDR, each with its time."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lsast_engines.errors import MissingExtraError, PictureError, shown
from lsast_engines.picture_file import MAX_BYTES, open_image

from ..images.canvas import Pixels
from ..images.formats import ANIMATIONS

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_CONTAINERS = "asf,avi,flv,gxf,h264,hevc,matroska,mov,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm"
"""FFmpeg's names of the formats that are read: none is a list of other files or addresses."""

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave the alpha channel out."""

_BT709, _UNSPECIFIED, _BT2020, _PQ, _HLG = 1, 2, 9, 16, 18
_WIDE_GAMUTS = (_BT2020, 11, 12)
"""FFmpeg's numbers of the primaries of BT.2020 and of both P3."""

_log = logging.getLogger("lsast.video")


@dataclass(frozen=True)
class Frame:
    """A picture of a video."""

    convert: Callable[[], Pixels]
    start: int
    """When it is shown, in `Source.time_base`; later than the frame before."""
    duration: int
    """How long, in `Source.time_base`; 0 is not known."""

    @functools.cached_property
    def pixels(self) -> Pixels:
        """[H, W, 3], or [H, W, 4] with opacity; converted when they are first asked for."""
        return self.convert()


class Source:
    """A video or an animated picture that is open."""

    time_base: Fraction
    """Seconds of a unit of time."""
    rate: Fraction
    """Frames in a second, on average."""
    count: int | None
    """Number of frames, if it is known before they are read."""
    sample_aspect = Fraction(1)
    """Width of a displayed pixel by its height."""
    plays = 0
    """How often an animated picture is shown; 0 is without end, also of a video."""

    def frames(self) -> Iterator[Frame]:
        """The frames, once; a `PictureError` for one of another size than the first."""
        raise NotImplementedError

    def _check_size(self, path: Path, width: int, height: int) -> None:
        if width * height * 8 > MAX_BYTES:
            raise PictureError(f"{path} has {width} x {height} pixels; expected fewer: scale it down")


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a video or, by the suffix, an animated picture. Raises a `MissingExtraError` without PyAV, a `PictureError`
    if it cannot be read, has no pictures, or too large ones."""
    if path.suffix.lower() in ANIMATIONS:
        with _opened_file(path) as handle:
            yield _Animation(path, handle)
    else:
        with opened(path) as container:
            yield _Video(path, container)


class _Video(Source):
    """The stream of pictures that FFmpeg finds best: the largest that is no cover."""

    def __init__(self, path: Path, container: InputContainer) -> None:
        av = pyav()
        self._path, self._container = path, container
        best: Any = container.streams.best("video")
        if best is None or best.disposition & av.stream.Disposition.attached_pic:
            raise PictureError(f"found no picture in {path}; expected a video")
        self._stream: VideoStream = best
        self._check_size(path, best.codec_context.width, best.codec_context.height)
        self.rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        self.time_base = self._stream.time_base or 1 / self.rate
        self.count = self._stream.frames or None
        self.sample_aspect = self._stream.sample_aspect_ratio or Fraction(1)
        self._start = start_of(container)
        self._damaged = 0

    def frames(self) -> Iterator[Frame]:
        """See `Source.frames`."""
        reformatter = pyav().video.reformatter.VideoReformatter()  # keeps its tables for the next frame
        size, last, duration, usual = None, None, 0, max(1, round(1 / self.rate / self.time_base))
        for number, frame in enumerate(_deinterlaced(self._decoded(), self._stream)):
            start = None
            if frame.pts is not None:
                start = round((frame.pts * (frame.time_base or self.time_base) - self._start) / self.time_base)
            if last is not None and (start is None or start <= last):  # missing, repeated, or back in time
                start = last + (1 if start == last else usual)
            start = start or 0
            last = start
            quarter_turn, _ = _orientation(frame)
            if size is not None and size != (frame.width, frame.height, quarter_turn):
                raise PictureError(
                    f"{self._path} changes its size at {float(start * self.time_base):.2f} s, from {size[0]} x "
                    f"{size[1]} to {frame.width} x {frame.height} pixels; expected one size: cut the video there"
                )
            size = (frame.width, frame.height, quarter_turn)
            if number == 0 and quarter_turn:
                self.sample_aspect = 1 / self.sample_aspect
            duration = round((frame.duration or 0) * (frame.time_base or self.time_base) / self.time_base)
            yield Frame(functools.partial(_rgb, frame, reformatter), start, duration)
        if self._damaged:
            _log.warning("%s: %d parts could not be decoded and are left out", shown(self._path), self._damaged)
        # FFmpeg does not tell of a file that is cut off. The sound may be longer than the pictures.
        # The tag counts from 0 (FFmpeg), or from the first picture.
        seconds = float((self._stream.duration or 0) * self.time_base) or (
            _seconds(self._stream.metadata.get("DURATION")) - float(self._start)
        )
        end = float(((last or 0) + max(duration, usual)) * self.time_base)
        if seconds - end > 3 / self.rate:
            _log.warning("%s: its pictures end at %.2f s of %.2f s; is it cut off?", shown(self._path), end, seconds)

    def _decoded(self) -> Iterator[VideoFrame]:
        av = pyav()
        decoder: Any = self._stream.codec_context
        name = _ALPHA_DECODERS.get(decoder.name)
        if name in av.codecs_available and self._stream.metadata.get("alpha_mode") == "1":
            decoder = av.CodecContext.create(name, "r")
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                decoded = decoder.decode(packet)
            except EOFError:  # the last packet told the decoder
                return
            except av.FFmpegError:  # what is damaged; where the file is cut off, no packet follows
                self._damaged += 1
                continue
            yield from decoded
            if packet is None:
                return


def _seconds(text: str | None) -> float:
    """Seconds of a time such as 00:01:02.5, as Matroska's tags have it; 0 of any other text."""
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d*)?)", text or "")
    return 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3]) if found else 0.0


class _Animation(Source):
    """An animated picture, by Pillow: FFmpeg 8 reads no animated WebP."""

    def __init__(self, path: Path, handle: BinaryIO) -> None:
        self._path = path
        try:
            self._image: Any = open_image(handle, str(path))
            self._number: int = getattr(self._image, "n_frames", 1)
            # What a PNG shows where it is not animated need not be a frame.
            self._first = int(getattr(self._image, "default_image", False) and self._number > 1)
        except PictureError:
            raise
        except Exception as error:  # Pillow's decoders raise many types for damaged files
            raise PictureError(f"{path} cannot be read ({error}); expected an animated picture") from error
        self._check_size(path, *self._image.size)
        self.count: int | None = self._number - self._first
        self.time_base, self.rate = Fraction(1, 1000), Fraction(10)
        self.plays = self._image.info.get("loop", 1)
        if self._image.format == "GIF" and self.plays:  # it holds the number of repetitions, and none at all for 1
            self.plays += "loop" in self._image.info

    def frames(self) -> Iterator[Frame]:
        """See `Source`."""
        start = 0
        for number in range(self._first, self._number):
            try:
                self._image.seek(number)
                image = self._image.convert("RGBA")
                image.load()
            except Exception as error:
                if number == self._first:
                    raise PictureError(f"{self._path} cannot be decoded ({error}); expected a whole picture") from error
                _log.warning("%s: %d frames could not be decoded and are left out", self._path, self._number - number)
                return
            # Browsers show what is to be shown for 10 ms or less for a tenth of a second.
            duration = round(self._image.info.get("duration") or 0)
            duration = duration if duration > 10 else 100
            yield Frame(functools.partial(np.asarray, image), start, duration)
            start += duration


def _deinterlaced(frames: Iterator[VideoFrame], stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames; if the first is interlaced, deinterlaced by FFmpeg's filter bwdif."""
    first = next(frames, None)
    if first is None:
        return
    if not first.interlaced_frame:
        yield from chain([first], frames)
        return
    graph = pyav().filter.Graph()
    buffer = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=stream.time_base)
    graph.link_nodes(buffer, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    yield from filtered(graph, chain([first], frames))


def filtered(graph: Any, frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """What a filter graph of FFmpeg makes of the frames, to the last."""
    graph.configure()
    for frame in chain(frames, [None]):
        graph.vpush(frame)
        with contextlib.suppress(BlockingIOError, EOFError):
            while True:
                yield graph.vpull()


def _orientation(frame: VideoFrame) -> tuple[bool, tuple[slice, slice]]:
    """Whether rows and columns change places, and how they run then, to the nearest quarter turn or mirror."""
    # The display matrix (libavutil/display.h) moves a pixel from (x, y) to (a x + c y, b x + d y).
    found: Any = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return False, (slice(None), slice(None))
    a, b, _, c, d = (int(entry) for entry in np.frombuffer(bytes(found), np.int32)[:5])
    quarter_turn = abs(b) + abs(c) > abs(a) + abs(d)
    down, right = (b, c) if quarter_turn else (d, a)
    return quarter_turn, (slice(None, None, -1 if down < 0 else 1), slice(None, None, -1 if right < 0 else 1))


def _rgb(frame: VideoFrame, reformatter: Any) -> Pixels:
    """The frame as it is displayed, [H, W, 3] or, with opacity, [H, W, 4]."""
    # By convention of all players untagged high definition is BT.709; the converter takes it for BT.601.
    colorspace = "itu709" if frame.colorspace == _UNSPECIFIED and frame.height >= 720 else None
    output: dict[str, Any] = {}
    is_hdr = frame.color_trc in (_PQ, _HLG)
    if is_hdr or frame.color_primaries in _WIDE_GAMUTS:
        # Diffuse white, 203 cd/m² (ITU-R BT.2408), becomes white; what is brighter is clipped.
        output = {"dst_color_trc": _BT709, "dst_color_primaries": _BT709, "dst_colorspace": "itu709"}
        frame.color_trc = frame.color_trc if is_hdr else _BT709
        if frame.color_primaries == _UNSPECIFIED:
            frame.color_primaries = _BT2020
        if frame.colorspace == _UNSPECIFIED:
            frame.colorspace = _BT2020
        colorspace = None
    form = "rgba" if any(component.is_alpha for component in frame.format.components) else "rgb24"
    pixels = reformatter.reformat(frame, format=form, src_colorspace=colorspace, **output).to_ndarray()
    quarter_turn, flips = _orientation(frame)
    return np.ascontiguousarray((pixels.transpose(1, 0, 2) if quarter_turn else pixels)[flips], dtype=np.uint8)


def start_of(container: InputContainer) -> Fraction:
    """When the first stream of a file begins, in seconds, if that is later than 0: so it is with broadcasts."""
    return Fraction(max(0, container.start_time or 0), 1_000_000)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """Open a video; errors as of `open_source`. Its name is never an address, its content never a list of files."""
    av = pyav()
    with _opened_file(path) as handle:
        try:
            container = av.open(handle, options={"format_whitelist": _CONTAINERS})
        except (av.FFmpegError, OSError, ValueError) as error:
            raise PictureError(f"{path} cannot be read as a video ({error}); expected a whole video file") from error
        with container:
            yield container


@contextlib.contextmanager
def _opened_file(path: Path) -> Iterator[BinaryIO]:
    try:
        if path.exists() and not path.is_file():
            raise PictureError(f"found {path}, which is no file; expected one: a video is read more than once")
        handle = path.open("rb")
    except FileNotFoundError:
        raise PictureError(f"found no file {path}; expected a video") from None
    except OSError as error:
        raise PictureError(f"{path} cannot be read ({error.strerror}); expected a video") from error
    with handle:
        yield handle


def pyav() -> Any:
    """The module `av`; a `MissingExtraError` where it is not installed."""
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "video") from None
    return av
