import gc
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lsast import PictureError, UsageError
from lsast.video.source import open_source
from lsast.video.transcode import check_video, paint_video
from lsast.video.writing import SegmentEncoder

av = pytest.importorskip("av", reason="needs the extra [video]")

QUICK: dict[str, Any] = {"size": 64, "guidance": 1.0, "steps": 3}
RATE = 24000
SEGMENT = 6
"""Frames of a segment in these tests."""


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsast.video.transcode.SEGMENT", SEGMENT)


def write_clip(
    path: Path,
    photo: np.ndarray,
    frames: int,
    sound: str | None = "aac",
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    display: tuple[int, bool, bool] = (0, False, False),
    aspect: Fraction = Fraction(1),
    size: tuple[int, int] = (96, 64),
    start: int = 0,
) -> list[int]:
    """A clip of a picture that moves by two pixels a frame, in H.264 with irregular times; the times.

    `display`: degrees that it is turned to the left, and how it is mirrored then. With opacity, its left has none.
    `start`: number of the first frame, of other codecs.
    """
    irregular = codec == "libx264"
    times = [frame * 1001 + 100 * (frame % 3) if irregular else start + frame for frame in range(frames)]
    unit = Fraction(1, 24000 if irregular else 24)
    with av.open(str(path), "w") as container:
        options = {"crf": "1"} if irregular else {}
        stream = container.add_stream(codec, rate=Fraction(24000, 1001) if irregular else 24, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.sample_aspect_ratio = aspect
        stream.codec_context.time_base = unit
        if any(display):
            stream.set_display_rotation(*display)
        tone = container.add_stream(sound, rate=RATE, layout="mono") if sound else None
        if tone is not None:
            tone.bit_rate = 64000
        for frame, pts in enumerate(times):
            picture = np.ascontiguousarray(photo[:64, 2 * frame % 60 :][:, :96])
            image = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(*size, "rgba")
            if "a" in pixels:
                opaque = image.to_ndarray()
                opaque[:, : size[0] // 2, 3] = 0
                image = av.VideoFrame.from_ndarray(opaque, "rgba")
            image.pts, image.time_base = pts, unit
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
        if tone is not None:
            resampler = av.AudioResampler(tone.format, "mono", RATE, tone.codec_context.frame_size or 1024)
            wave = (np.sin(np.arange(1024 * frames) / 20) * 16000).astype(np.int16)
            samples = av.AudioFrame.from_ndarray(wave[None], "s16", "mono")
            samples.sample_rate, samples.pts = RATE, 0
            for part in (*resampler.resample(samples), *resampler.resample(None), None):
                container.mux(tone.encode(part))
    return times


def read(path: Path) -> tuple[list[np.ndarray], list[Fraction], list[bytes]]:
    """Frames, their times in seconds, and the packets of the sound."""
    with av.open(f"file:{path}") as container:
        frames, times = [], []
        for frame in container.decode(video=0):
            frames.append(frame.to_ndarray(format="rgb24"))
            times.append(frame.pts * frame.time_base)
    with av.open(f"file:{path}") as container:
        sound = [bytes(packet) for packet in container.demux(audio=0) if packet.size] if container.streams.audio else []
    return frames, times, sound


def stop_at(frame: int, frames: int = 4) -> Callable[[int, int | None], None]:
    """An `on_frame` that interrupts the painting of a video of so many frames."""

    def stop(done: int, total: int | None) -> None:
        assert total == frames
        if done == frame:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".m4v"])
def test_paint_video_paints_pictures_and_keeps_times_and_sound(stylizer, photo, tmp_path, suffix):
    source, out = tmp_path / "clip.mp4", tmp_path / f"out{suffix}"
    times = write_clip(source, photo, SEGMENT + 5)
    facts = paint_video(source, out, stylizer, QUICK)
    assert (facts["frames"], facts["resumed"]) == (SEGMENT + 5, 0)
    frames, found, sound = read(out)
    late = found[0] if suffix == ".mkv" else 0  # Matroska counts in milliseconds, and from the sound's lead-in on
    assert [(time - late) * 24000 for time in found] == pytest.approx(times, abs=26 if late else 0)
    assert sound == read(source)[2] != []
    paintings = [np.asarray(r.image) for r in stylizer.stylize_frames(read(source)[0], **QUICK)]
    assert len(frames) == len(paintings)
    for frame, painting in zip(frames, paintings, strict=True):
        assert np.abs(frame.astype(int) - painting).mean() < 4  # what H.264 loses
    assert {path.name for path in tmp_path.iterdir()} == {source.name, out.name}


def test_paint_video_after_a_stop_continues_to_the_same_video(stylizer, photo, tmp_path):
    source, out, whole = tmp_path / "clip.mp4", tmp_path / "out.mp4", tmp_path / "whole.mp4"
    write_clip(source, photo, 2 * SEGMENT + 3)
    paint_video(source, whole, stylizer, QUICK)

    for options in (QUICK, {**QUICK, "seed": 3}, QUICK):  # other options: from the start
        with pytest.raises(KeyboardInterrupt):
            paint_video(source, out, stylizer, options, on_frame=stop_at(SEGMENT + 2, 2 * SEGMENT + 3))
        assert not out.exists()
    assert paint_video(source, out, stylizer, QUICK)["resumed"] == SEGMENT
    assert out.read_bytes() == whole.read_bytes()


def test_encoder_gives_the_same_bytes_for_the_same_frames(photo, tmp_path):
    """x264 with its AVX-512 code gives other bytes once in about 500 times (96 pixels are not a multiple of 128)."""
    write_clip(tmp_path / "clip.mp4", photo, SEGMENT, sound=None)
    rng, segments = np.random.default_rng(0), set()
    with open_source(tmp_path / "clip.mp4") as source:
        frames = list(source.frames())
        for _ in range(150):
            numbers = [rng.random(rng.integers(1, 50_000)) for _ in range(8)]  # what the next buffers may hold
            del numbers[::2]
            encoder = SegmentEncoder(source, lossless=False)
            for frame in frames:
                encoder.add(Image.fromarray(frame.pixels), frame)
            segments.add(encoder.finish())
    assert len(segments) == 1


def test_paint_video_memory_does_not_grow_with_the_length(stylizer, photo, tmp_path):
    held: list[int] = []

    def measure(done: int, total: int | None) -> None:
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])

    write_clip(tmp_path / "clip.mp4", photo, 6 * SEGMENT)
    gc.freeze()  # only what comes is collected, which is quick
    tracemalloc.start()
    paint_video(tmp_path / "clip.mp4", tmp_path / "out.mp4", stylizer, QUICK, on_frame=measure)
    tracemalloc.stop()
    gc.unfreeze()
    assert held[6 * SEGMENT] - held[2 * SEGMENT] < 96 * 64 * 3 * 4 * SEGMENT / 10


def test_check_video_with_invalid_arguments_raises_before_painting(photo, tmp_path):
    source = tmp_path / "clip.mkv"
    with av.open(str(source), "w") as container:
        tone = container.add_stream("pcm_u8", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.uint8), "u8", "mono")
        samples.sample_rate = 8000
        container.mux(tone.encode(samples))
        container.mux(tone.encode(None))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")  # no file that a file names is read
    write_clip(tmp_path / "clip.mp4", photo, 2)
    before = os.listdir(tmp_path)
    for given, out, error, words in (
        ("clip.mkv", "out.mp4", PictureError, "no picture"),
        *(
            (f"{name}.mp4", "out.mp4", PictureError, "cannot be read as a video")
            for name in ("broken", "empty", "list")
        ),
        ("missing.mp4", "out.mp4", PictureError, "found no file"),
        ("clip.mp4", "out.png", UsageError, r"out\.png; expected a name that ends in \.apng, \.gif, \.m4v"),
        ("clip.mp4", "clip.mp4", UsageError, r"clip\.mp4 as both IN and OUT"),
    ):
        with pytest.raises(error, match=words):
            check_video(tmp_path / given, tmp_path / out)
    check_video(tmp_path / "clip.mp4", tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == before


def test_check_video_with_sound_that_the_format_cannot_hold_raises(stylizer, photo, tmp_path):
    source = tmp_path / "clip.mkv"
    write_clip(source, photo, 1, "pcm_u8")
    with pytest.raises(PictureError, match=r"pcm_u8.*\.mkv, which holds any sound"):
        paint_video(source, tmp_path / "out.mp4", stylizer, QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mkv"]
    paint_video(source, tmp_path / "out.mkv", stylizer, QUICK)
    assert read(tmp_path / "out.mkv")[2] == read(source)[2] != []


def test_lsast_run_paints_videos_beside_pictures(run, photo, tmp_path):
    options = [f"--{name}={value}" for name, value in QUICK.items()]
    write_clip(tmp_path / "clip.mp4", photo, 4)
    result = run("clip.mp4", "out.mkv", "--json", *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["out"], report["frames"], report["resumed"], report["style"]) == ("out.mkv", 4, 0, "vangogh")
    assert len(read(tmp_path / "out.mkv")[0]) == 4
    (tmp_path / "broken.mov").write_bytes(b"no video")
    result = run("clip.mp4", "broken.mov", "out/", *options)
    assert (result.exit_code, result.stdout) == (1, "out/clip.mp4\n")
    assert "painted 1, failed 1\n  - broken.mov cannot be read" in result.stderr
    assert run("clip.mp4", "out.png").exit_code == 2


def test_lsast_run_of_a_video_after_a_kill_continues(folder, photo, tmp_path):
    write_clip(tmp_path / "clip.mp4", photo, 4 * SEGMENT)
    program = "from lsast.video import transcode; from lsast.cli.main import main; "
    program += f"transcode.SEGMENT = {SEGMENT}; main()"
    command = [sys.executable, "-c", program, "clip.mp4", "out.mp4", "--size", "64", "--steps", "20", "--json"]
    process = subprocess.Popen(command)
    state = tmp_path / ".out.mp4.parts" / "state.npz"
    while not state.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()  # SIGKILL where there are signals
    process.wait(60)
    assert not (tmp_path / "out.mp4").exists()
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert json.loads(done.stdout)["resumed"] in (SEGMENT, 2 * SEGMENT, 3 * SEGMENT)
    assert len(read(tmp_path / "out.mp4")[0]) == 4 * SEGMENT
