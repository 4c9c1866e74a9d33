"""Paint the frames of a video and write them as numbered pictures, with OpenCV.

    python examples/frames.py clip.mp4 frames --every 2

Each frame follows the painting before it, so that strokes stay where they are. (`lsast-run clip.mp4 out.mp4` writes a
video with its sound; this is for those who want the frames.) Needs `pip install 'lsast[cpu]'`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import lsast


def frames(path: Path, every: int = 1) -> Iterator[np.ndarray[Any, Any]]:
    """Every `every`-th frame of a video, RGB [H, W, 3]."""
    video = cv2.VideoCapture(str(path))
    try:
        number = 0
        while video.grab():
            if number % every == 0:
                _, bgr = video.retrieve()
                yield np.ascontiguousarray(bgr[..., ::-1])
            number += 1
    finally:
        video.release()


def main(path: Path, folder: Path, every: int, options: dict[str, Any]) -> int:
    """Write `folder`/00000.png …; how many there are."""
    count = 0
    with lsast.load() as stylizer:
        for result in stylizer.stylize_frames(frames(path, every), **options):  # never more than one in memory
            result.save(folder / f"{count:05d}.png")
            count += 1
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--style", default="vangogh")
    arguments = parser.parse_args()
    main(arguments.video, arguments.folder, arguments.every, {"style": arguments.style})
