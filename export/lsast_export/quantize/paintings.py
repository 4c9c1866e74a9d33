"""Pictures to calibrate and to evaluate on, and their paintings by the runtime: what is measured is what users see."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsast.request import make_schedule
from lsast.sessions.engine_pool import EnginePool
from lsast.stylizer import Stylizer
from lsast_engines.backends.base import ComputeDtype, Engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.errors import UsageError
from lsast_engines.images import find_pictures, import_opencv, read_picture

from ..progress import Eta, Progress, no_progress

Pixels = npt.NDArray[np.uint8]


def load_calibration_images(folder: Path | None, count: int, side: int) -> tuple[list[Pixels], str]:
    """Square pictures [side, side, 3], and their origin: the name of `folder`, or ``drawn``.

    Pictures of `folder` are cropped to squares; None generates some.

    Raises:
        UsageError: the folder holds fewer.
        PictureError: no such folder, or a file that is no picture.
    """
    if folder is None:
        return [_drawn(seed, side) for seed in range(count)], "drawn"
    from PIL import Image, ImageOps

    paths = find_pictures(folder)
    if len(paths) < count:
        raise UsageError(f"found {len(paths)} pictures in {folder}; expected at least {count}")
    # Spread over the folder, whose first files may be similar.
    chosen = [paths[index * len(paths) // count] for index in range(count)]
    whole = (Image.fromarray(read_picture(path).rgb) for path in chosen)
    squares = [ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS) for picture in whole]
    return [np.asarray(square, np.uint8) for square in squares], folder.name


def paint(
    bundle: Bundle,
    pictures: Sequence[Pixels],
    styles: Sequence[str],
    backend: str,
    engines: Mapping[str, Engine] | None = None,
    compute_dtype: ComputeDtype = "fp32",
    seed: int = 0,
    progress: Progress = no_progress,
    **options: Any,
) -> list[Pixels]:
    """`pictures` [side, side, 3], of a legal size, painted on the CPU in `styles` in turn, each with a seed of its own.

    Args:
        styles: names of styles of `bundle`, whose own defaults apply.
        engines: run in place of the bundle's graphs of these names; they are closed at the end, also of a failure.
        seed: of the first picture.
        progress: called after each step.
        options: see `lsast.Stylizer.stylize`.
    """
    with contextlib.ExitStack() as stack:
        for engine in (engines or {}).values():
            stack.callback(engine.close)
        pool = EnginePool(bundle, backend, "cpu", compute_dtype=compute_dtype, graphs=())
        pool.engines.update(engines or {})
        stylizer = stack.enter_context(Stylizer(pool))
        given = [
            {**options, "style": styles[index % len(styles)], "size": len(rgb), "seed": seed + index}
            for index, rgb in enumerate(pictures)
        ]
        schedules = [make_schedule(bundle, stylizer.resolve(**each)) for each in given]
        eta = Eta(progress, "painting", sum(len(schedule.steps) for schedule in schedules))

        def on_step(done: int, _steps: int, _preview: object) -> None:
            if done:
                eta.step()

        return [
            np.asarray(stylizer.stylize(rgb, **each, on_step=on_step))
            for rgb, each in zip(pictures, given, strict=True)
        ]


def _drawn(seed: int, side: int) -> Pixels:
    """Coloured noise with a power spectrum of 1/f², as photographs have, behind polygons with sharp edges."""
    generator = np.random.default_rng(1000 + seed)
    rows, columns = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / side)
    planes = [np.fft.ifft2(np.fft.fft2(generator.standard_normal((side, side))) * falling).real for _ in range(3)]
    shared = planes[0] / planes[0].std()
    stacked = np.stack([shared + 0.5 * plane / plane.std() for plane in planes], axis=-1)
    picture = np.ascontiguousarray(np.clip(128 + 45 * stacked, 0, 255).astype(np.uint8))
    cv2 = import_opencv()
    for _ in range(6):
        colour = tuple(int(level) for level in generator.integers(0, 256, 3))
        corners = generator.integers(0, side, (int(generator.integers(3, 7)), 2)).astype(np.int32)
        cv2.fillPoly(picture, [corners], colour, lineType=cv2.LINE_AA)
    return picture
