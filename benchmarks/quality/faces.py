"""Faces: found in the contents by OpenCV's cascades, and compared there with what a method made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lsast_engines.images import read_on_white
from lsast_eval.metrics.content import resized, shrunk
from lsast_eval.metrics.efficientnet import EffNetLite, perceptual_distance

SIDE = 512
"""Shorter side of the pictures that faces are looked for in."""
CROP = 128
"""Side of the compared crops."""


@dataclass(frozen=True)
class FaceFigures:
    """What became of the faces of the contents."""

    faces: int
    distance: float
    """Mean feature distance (EfficientNet-Lite0) of the faces' boxes; nan without faces."""
    found_again: float
    """Part of the faces that the cascade finds in the result, too."""


class Faces:
    """The faces in some contents.

    Raises:
        SystemExit: OpenCV 5, which has no cascades any more.
    """

    def __init__(self, contents: Sequence[Path]) -> None:
        if not hasattr(cv2, "CascadeClassifier"):
            raise SystemExit(f"found OpenCV {cv2.__version__}; faces need: pip install 'opencv-python-headless<5'")
        self._cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_alt2.xml")
        self._network = EffNetLite()
        self._boxes: dict[Path, list[tuple[int, int, int, int]]] = {}
        for path in contents:
            if boxes := self._find(shrunk(read_on_white(path), SIDE)):
                self._boxes[path] = boxes

    def _find(self, rgb: npt.NDArray[np.uint8]) -> list[tuple[int, int, int, int]]:
        grey = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
        return [tuple(map(int, box)) for box in self._cascade.detectMultiScale(grey, 1.1, 6, minSize=(40, 40))]  # type: ignore[misc]

    def compare(self, results: Mapping[str, Path]) -> FaceFigures:
        """Compare with the results, by stem of the content."""
        distances, again = [], []
        for path, boxes in self._boxes.items():
            content = shrunk(read_on_white(path), SIDE)
            result = resized(read_on_white(results[path.stem]), *content.shape[:2])
            found = self._find(result)
            for x, y, w, h in boxes:
                pair = (resized(rgb[y : y + h, x : x + w], CROP, CROP) for rgb in (content, result))
                distances.append(perceptual_distance(*(self._network.feature_maps(crop) for crop in pair)))
                again.append(
                    any(abs(x + w / 2 - u - a / 2) < w / 2 > abs(y + h / 2 - v - b / 2) for u, v, a, b in found)
                )
        return FaceFigures(len(distances), float(np.mean(distances or np.nan)), float(np.mean(again or np.nan)))
