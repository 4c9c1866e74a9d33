"""Two synthetic hands, stripes and blots, and photographs of neither kind."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lsast_eval.metrics.content import Pixels

SIDE = 128
COUNT, WORKS = 6, 12
"""How many contents there are; pictures in the folder of each artist, and in that of the photos."""


def scene(seed: int, side: int = SIDE) -> Pixels:
    """A picture with shapes of sharp edges on a soft ground, [side, side, 3]."""
    rng = np.random.default_rng(seed)
    canvas = cv2.GaussianBlur(rng.uniform(90, 160, (side, side, 3)).astype(np.float32), (0, 0), side / 10)
    for _ in range(6):
        colour = tuple(float(value) for value in rng.integers(0, 255, 3))
        x, y, r = (int(value) for value in rng.integers(side // 8, side // 2, 3))
        if rng.integers(2):
            cv2.circle(canvas, (2 * x, 2 * y), r // 2, colour, -1)
        else:
            cv2.rectangle(canvas, (x, y), (x + r, y + r), colour, -1)
    return canvas.clip(0, 255).astype(np.uint8)


def hand(kind: str, seed: int, side: int = SIDE) -> Pixels:
    """A work of one of two artists: ``stripes`` are slanted and blue, ``blots`` round and brown."""
    rng = np.random.default_rng([seed, len(kind)])
    yy, xx = np.mgrid[:side, :side].astype(np.float32)
    if kind == "stripes":
        texture = np.sin((xx * rng.uniform(0.7, 1.3) + yy) * rng.uniform(0.5, 0.8))
        colour = np.array([60, 90, 190])
    else:
        noise = cv2.GaussianBlur(rng.normal(0, 1, (side, side)).astype(np.float32), (0, 0), rng.uniform(3, 5))
        texture = np.sign(noise)
        colour = np.array([150, 100, 50])
    shade: npt.NDArray[np.float64] = colour + rng.integers(-15, 15, 3) + 45 * texture[:, :, None]
    return (shade + rng.normal(0, 4, shade.shape)).clip(0, 255).astype(np.uint8)


def save(folder: Path, name: str, rgb: Pixels) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(folder / f"{name}.png")
    return folder / f"{name}.png"


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`COUNT` in ``contents``; `WORKS` in ``artists/stripes``, in ``artists/blots`` and in ``photos``."""
    root = tmp_path_factory.mktemp("studio")
    for seed in range(COUNT):
        save(root / "contents", f"scene{seed}", scene(seed))
    for seed in range(WORKS):
        save(root / "photos", f"p{seed}", scene(1000 + seed))
        for kind in ("stripes", "blots"):
            save(root / "artists" / kind, f"w{seed}", hand(kind, seed))
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of pictures, computed once for all tests."""
    return tmp_path_factory.mktemp("cache")
