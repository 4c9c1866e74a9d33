"""What videos and animated pictures may be like: each is painted as a player shows it, or refused in plain words."""

import errno
import itertools
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lsast
from lsast import PictureError
from lsast.video.source import open_source
from lsast.video.transcode import paint_video

from .test_transcode import QUICK, read, stop_at, write_clip

av = pytest.importorskip("av", reason="needs the extra [video]")


def pixels_of(path: Path) -> list[np.ndarray]:
    with open_source(path) as source:
        return [frame.pixels for frame in source.frames()]


@pytest.mark.parametrize("display", [(0, True, False), (0, False, True), (180, False, False), (270, True, False)])
def test_frames_are_turned_and_mirrored_as_they_are_displayed(photo, tmp_path, display):
    write_clip(tmp_path / "plain.mp4", photo, 1, None)
    write_clip(tmp_path / "turned.mp4", photo, 1, None, display=display)
    turn, left_right, upside_down = display
    expected = np.rot90(pixels_of(tmp_path / "plain.mp4")[0], turn // 90)
    expected = expected[:, ::-1] if left_right else expected
    expected = expected[::-1] if upside_down else expected
    np.testing.assert_array_equal(pixels_of(tmp_path / "turned.mp4")[0], expected)


@pytest.mark.parametrize(("turn", "expected"), [(0, Fraction(4, 3)), (90, Fraction(3, 4))])
def test_paint_video_keeps_the_shape_of_displayed_pixels(stylizer, photo, tmp_path, turn, expected):
    write_clip(tmp_path / "clip.mp4", photo, 2, None, aspect=Fraction(4, 3), display=(turn, False, False))
    paint_video(tmp_path / "clip.mp4", tmp_path / "out.mp4", stylizer, QUICK)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == expected


@pytest.mark.parametrize(("transfer", "white"), [(16, 0.5807), pytest.param(18, 0.75, marks=pytest.mark.slow)])
def test_frames_in_hdr_have_white_where_diffuse_white_was(tmp_path, transfer, white):
    """203 cd/m² is 58 % of the PQ signal and 75 % of HLG's (ITU-R BT.2408, table 1)."""
    with av.open(str(tmp_path / "hdr.mkv"), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
        image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), round(white * 65535), np.uint16), "rgb48le")
        image = image.reformat(format="yuv420p10le", dst_colorspace="bt2020", dst_color_range="MPEG")
        container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    [pixels] = pixels_of(tmp_path / "hdr.mkv")
    assert pixels.min() >= 250


def test_frames_that_change_their_size_end_with_the_time(photo, tmp_path):
    for name, size in (("a.ts", (96, 64)), ("b.ts", (64, 96))):
        write_clip(tmp_path / name, photo, 4, None, codec="mpeg2video", size=size)
    both = (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
    (tmp_path / "both.ts").write_bytes(both)
    with pytest.raises(PictureError, match=r"changes its size at 0\.\d\d s, from 96 x 64 to 64 x 96 pixels"):
        pixels_of(tmp_path / "both.ts")


@pytest.mark.parametrize(
    ("name", "codec", "sound", "size"),
    [
        ("clip.m2ts", "mpeg2video", "aac", (96, 64)),
        ("clip.wmv", "wmv2", "wmav2", (96, 64)),
        ("clip.mpg", "mpeg1video", "mp2", (96, 64)),
        ("clip.3gp", "h263", "aac", (176, 144)),
        ("clip.flv", "flv", "aac", (96, 64)),
    ],
)
def test_paint_video_reads_every_common_kind(stylizer, photo, tmp_path, name, codec, sound, size):
    source, out = tmp_path / name, tmp_path / "out.mkv"
    write_clip(source, photo, 3, sound, codec=codec, size=size)
    assert paint_video(source, out, stylizer, QUICK)["frames"] == 3
    frames, times, heard = read(out)
    assert (frames[0].shape[1::-1], len(frames)) == (size, 3)
    assert [float(time - times[0]) for time in times] == pytest.approx([0, 1 / 24, 2 / 24], abs=2e-3)
    if name in ("clip.wmv", "clip.m2ts"):  # PyAV does not copy this into Matroska; a broadcast's packets have headers
        assert heard
    else:
        assert heard == read(source)[2] != []


def test_paint_video_mends_repeated_and_missing_times_of_sound(stylizer, photo, tmp_path):
    write_clip(tmp_path / "clip.mkv", photo, 6, "pcm_s16le", codec="mpeg4")
    source = tmp_path / "faulty.mkv"
    with av.open(str(tmp_path / "clip.mkv")) as clip, av.open(str(source), "w") as faulty:
        streams = {stream.index: faulty.add_stream_from_template(stream) for stream in clip.streams}
        for packet in clip.demux():
            if packet.size:
                if packet.stream.type == "audio" and packet.pts < 60:
                    packet.pts = packet.dts = 0
                packet.stream = streams[packet.stream.index]
                faulty.mux(packet)
    paint_video(source, tmp_path / "out.mov", stylizer, QUICK)
    sound = read(source)[2]
    assert b"".join(read(tmp_path / "out.mov")[2]) == b"".join(sound) != b""


@pytest.mark.parametrize("name", ["12:30.mp4", "a%03d.mp4", "-.mp4", "http:x.mp4", "n" * 251 + ".mp4"])
def test_paint_video_takes_names_as_they_are(stylizer, photo, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_clip(Path("clip.mp4"), photo, 2)
    os.rename("clip.mp4", name)
    Path("out").mkdir()
    paint_video(Path(name), Path("out") / name, stylizer, QUICK)
    assert len(read(Path("out") / name)[0]) == 2
    assert os.listdir("out") == [name]


@pytest.mark.parametrize(("codec", "pixels"), [("qtrle", "argb"), ("prores_ks", "yuva444p10le")])
def test_paint_video_keeps_transparency_or_composites_it_on_white(stylizer, photo, tmp_path, caplog, codec, pixels):
    write_clip(tmp_path / "clip.mov", photo, 2, None, codec=codec, pixels=pixels)
    paint_video(tmp_path / "clip.mov", tmp_path / "out.gif", stylizer, QUICK)
    with Image.open(tmp_path / "out.gif") as painted:
        alpha = np.asarray(painted.convert("RGBA"))[:, :, 3]
    assert alpha[:, :40].max() == 0
    assert alpha[:, 56:].min() == 255
    assert not caplog.records
    paint_video(tmp_path / "clip.mov", tmp_path / "out.mp4", stylizer, QUICK)
    assert read(tmp_path / "out.mp4")[0][0][:, :40].min() > 250
    assert "composited on white" in caplog.text


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_paint_video_of_animated_pictures_keeps_times_and_opacity(stylizer, photo, tmp_path, suffix):
    pictures, durations = [], [100, 200, 300, 400]
    for number in range(4):
        pixels = np.dstack([photo[:48, 10 * number :][:, :64], np.full((48, 64), 255, np.uint8)])
        pixels[24:, :24, 3] = 0
        pictures.append(Image.fromarray(pixels))
    source = tmp_path / f"in{suffix}"
    pictures[0].save(source, save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=2)
    for out in (tmp_path / f"out{suffix}", tmp_path / "out.mp4"):
        assert paint_video(source, out, stylizer, QUICK)["frames"] == 4
    with Image.open(tmp_path / f"out{suffix}") as painted:
        found, opacity = [], []
        for number in range(painted.n_frames):
            painted.seek(number)
            opacity.append(np.asarray(painted.convert("RGBA"))[:, :, 3])
            found.append(painted.info["duration"])
    assert found == durations
    assert all(alpha[28:, :20].max() == 0 and alpha[:20].min() == 255 for alpha in opacity)
    assert read(tmp_path / "out.mp4")[1] == [Fraction(time, 10) for time in (0, 1, 3, 6)]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration == 1_000_000


def test_frames_of_an_animated_png_leave_its_default_image_out(tmp_path):
    default, *frames = (Image.fromarray(np.full((8, 8, 3), grey, np.uint8)) for grey in (9, 99, 199))
    default.save(tmp_path / "in.png", save_all=True, append_images=frames, default_image=True, duration=[100, 300])
    with open_source(tmp_path / "in.png") as source:
        found = [(frame.pixels[0, 0, 0], frame.duration) for frame in source.frames()]
        assert (source.count, found) == (2, [(99, 100), (199, 300)])


@pytest.mark.parametrize("plays", [0, 1, 4])
@pytest.mark.parametrize("suffix", [".gif", ".webp", ".apng"])
def test_paint_video_of_an_animated_picture_is_shown_as_often_as_it_is(stylizer, photo, tmp_path, suffix, plays):
    def loop(path: Path) -> int | None:
        if path.suffix != ".gif":
            return plays
        return {0: 0, 1: None}.get(plays, plays - 1)  # GIF holds the number of repetitions, and none at all for 1

    first, second = (Image.fromarray(photo[at : at + 48, :64]) for at in (0, 16))
    source = tmp_path / f"in{suffix}"
    words = {} if loop(source) is None else {"loop": loop(source)}
    first.save(source, {".apng": "PNG"}.get(suffix), save_all=True, append_images=[second], **words)
    for out in (tmp_path / f"out{kind}" for kind in (".gif", ".webp", ".apng")):
        paint_video(source, out, stylizer, QUICK)
        with Image.open(out) as painted:
            assert painted.info.get("loop") == loop(out)


def test_paint_video_of_a_damaged_stream_paints_what_can_be_decoded(stylizer, photo, tmp_path, caplog):
    write_clip(tmp_path / "clip.avi", photo, 8, None, codec="mjpeg", pixels="yuvj420p")
    content = bytearray((tmp_path / "clip.avi").read_bytes())
    starts = [at for at in range(len(content)) if content[at : at + 3] == b"\xff\xd8\xff"]
    for at, following in itertools.pairwise(starts[:3]):  # the first frames, too
        content[at : following - 8] = bytes(following - 8 - at)
    (tmp_path / "damaged.avi").write_bytes(content)
    assert paint_video(tmp_path / "damaged.avi", tmp_path / "out.mp4", stylizer, QUICK)["frames"] == 6
    assert "2 parts could not be decoded and are left out" in caplog.text
    (tmp_path / "short.avi").write_bytes(content[: starts[6]])
    assert paint_video(tmp_path / "short.avi", tmp_path / "out.mp4", stylizer, QUICK)["frames"] >= 3


@pytest.mark.parametrize("fault", ["state", "segment", "folder", "style"])
def test_paint_video_throws_a_useless_unfinished_painting_away(
    bundle_path, photo, tmp_path, monkeypatch, caplog, fault
):
    source, out, copy = tmp_path / "clip.mp4", tmp_path / "out.mp4", tmp_path / "bundle"
    write_clip(source, photo, 4, None)
    shutil.copytree(bundle_path, copy)
    monkeypatch.setattr("lsast.video.transcode.SEGMENT", 2)
    with lsast.load(copy) as first, pytest.raises(KeyboardInterrupt):
        paint_video(source, out, first, QUICK, on_frame=stop_at(3))
    folder = tmp_path / ".out.mp4.parts"
    if fault == "state":
        (folder / "state.npz").write_bytes(b"PK\3\4junk")
    elif fault == "segment":
        (folder / "000000.nut").write_bytes(b"")
    elif fault == "folder":
        (folder / "state.npz").unlink()
        (folder / "state.npz").mkdir()
    else:  # learned anew, under the same name
        shutil.copy(copy / "styles" / "monet.safetensors", copy / "styles" / "vangogh.safetensors")
    with lsast.load(copy) as second:
        assert paint_video(source, out, second, QUICK)["resumed"] == 0
        assert "the unfinished painting is thrown away" in caplog.text
        paint_video(source, tmp_path / "whole.mp4", second, QUICK)
    assert out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not folder.exists()


def test_paint_video_of_an_output_that_another_run_paints_raises(stylizer, photo, tmp_path):
    source, out = tmp_path / "clip.mp4", tmp_path / "out.mp4"
    write_clip(source, photo, 3, None)
    found: list[str] = []

    def second(done: int, total: int | None) -> None:
        if done == 2:
            with pytest.raises(PictureError) as error:
                paint_video(source, out, stylizer, QUICK)
            found.append(str(error.value))

    assert paint_video(source, out, stylizer, QUICK, on_frame=second)["frames"] == 3
    assert found == [f"{out} is being painted by another run; wait for it, or take another OUT"]


def test_paint_video_that_cannot_write_says_why_and_goes_on_later(stylizer, photo, tmp_path, monkeypatch):
    source, out = tmp_path / "clip.mp4", tmp_path / "out.mp4"
    write_clip(source, photo, 3, None)
    if Path("/proc/self").is_dir():
        with pytest.raises(PictureError, match=r"cannot write /proc/out\.mp4"):
            paint_video(source, Path("/proc/out.mp4"), stylizer, QUICK)

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.mp4.parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PictureError, match="a link or a folder of another user"):
        paint_video(source, out, stylizer, QUICK)
    assert not os.listdir(tmp_path / "elsewhere")
    (tmp_path / ".out.mp4.parts").unlink()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lsast.video.transcode.join", full)
        with pytest.raises(PictureError, match=r"cannot write .*out\.mp4 \(\[Errno 28\] No space left on device"):
            paint_video(source, out, stylizer, QUICK)
    assert paint_video(source, out, stylizer, QUICK)["resumed"] == 3


def test_paint_video_of_a_file_that_is_cut_off_tells_where(stylizer, photo, tmp_path, caplog):
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    write_clip(whole, photo, 9, "mp3", codec="ffv1", pixels="bgr0")
    paint_video(whole, tmp_path / "out.mp4", stylizer, QUICK)
    assert "cut off" not in caplog.text
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    assert paint_video(cut, tmp_path / "out.mp4", stylizer, QUICK)["frames"] < 6
    assert re.search(r"its pictures end at 0\.\d\d s of 0\.3\d s; is it cut off\?", caplog.text)


def test_frames_of_a_matroska_file_that_begins_late_are_not_called_cut_off(photo, tmp_path, caplog):
    write_clip(tmp_path / "late.mkv", photo, 3, None, codec="ffv1", pixels="bgr0", start=24 * 60)
    with open_source(tmp_path / "late.mkv") as source:
        assert [float(frame.start * source.time_base) for frame in source.frames()] == [0, 0.042, 0.083]
    assert "cut off" not in caplog.text
