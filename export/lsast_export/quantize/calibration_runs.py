"""Denoising runs for calibration and for evaluation.

A graph is calibrated on inputs as they really occur: latents of every stage, with the styles, guidance and ControlNet
scale of the bundle. A quantized graph is evaluated by its pictures, compared with those of the float graphs from the
same noise.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsast_engines.backends.base import ComputeDtype, Engine
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import CONTROLNET_COND, DENOISER, VAE_DECODER, VAE_ENCODER
from lsast_engines.diffusion import TimestepSchedule, guide, make_solver
from lsast_engines.errors import UsageError
from lsast_engines.images import canny_edges, find_pictures, import_opencv, read_picture

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Feeds = dict[str, npt.NDArray[Any]]
Denoiser = Callable[[Feeds], Mapping[str, npt.NDArray[Any]]]

DRAWN = "drawn"
"""The origin that `load_calibration_images` returns for generated pictures."""


@dataclass(frozen=True, eq=False)
class SampleRun:
    """A denoising run that is ready to start."""

    schedule: TimestepSchedule
    style: str
    guidance: float
    hint: Floats
    """[1, C, h, w]"""
    noisy: Floats
    """[1, 4, h, w]: the latent that the run starts from."""
    control_scale: np.float32


def load_calibration_images(folder: Path | None, count: int, side: int) -> tuple[list[Pixels], str]:
    """Square pictures, and their origin.

    Args:
        folder: pictures of any size, of which `count` are cropped to squares; None generates some.

    Raises:
        UsageError: the folder holds fewer.
        PictureError: no such folder, or a file that is no picture.
    """
    if folder is None:
        return [_drawn(seed, side) for seed in range(count)], DRAWN
    paths = find_pictures(folder)
    if len(paths) < count:
        raise UsageError(f"found {len(paths)} pictures in {folder}; expected at least {count}")
    # Spread over the folder, whose first files may be similar.
    chosen = [paths[index * len(paths) // count] for index in range(count)]
    return [_square(read_picture(path).rgb, side) for path in chosen], folder.name


def prepare_runs(
    bundle: Bundle,
    pictures: Sequence[Pixels],
    styles: Sequence[str],
    backend: str,
    strength: float | None = None,
    seed: int = 0,
    folder: Path | None = None,
    compute_dtype: ComputeDtype = "fp32",
) -> list[SampleRun]:
    """A run for each picture, with the styles in turn; a style's own defaults apply.

    Args:
        pictures: [side, side, 3] each, of a legal size.
        styles: names of styles of `bundle`.
        strength: None is the default of style and bundle.
        seed: of the first run's noise; each run has its own.
        folder: its graphs are used in place of those of `bundle`.
    """
    manifest = bundle.manifest
    runs = []
    with (
        _opened(bundle, VAE_ENCODER, backend, folder, compute_dtype) as encoder,
        _opened(bundle, CONTROLNET_COND, backend, folder, compute_dtype) as embedder,
    ):
        for index, rgb in enumerate(pictures):
            style = bundle.open_style(styles[index % len(styles)])
            options = {**manifest.defaults, **style.defaults}
            schedule = TimestepSchedule.build(
                manifest.noise, options["steps"], strength or options["strength"], manifest.stages, options["solver"]
            )
            guidance = options["guidance"] if style.distilled_guidance is None else 1.0
            generator = np.random.default_rng(seed + index)
            planes = np.broadcast_to(canny_edges(rgb).astype(np.float32), (1, 3, *rgb.shape[:2]))
            hint = embedder({"edges": np.ascontiguousarray(planes)})["hint"].copy()
            posterior = {name: value.copy() for name, value in encoder(encoder_feeds(rgb)).items()}
            noise = generator.standard_normal(posterior["mean"].shape, dtype=np.float32)
            z0 = np.float32(manifest.latent_scale) * (posterior["mean"] + posterior["std"] * noise)
            noise = generator.standard_normal(z0.shape, dtype=np.float32)
            noisy = schedule.add_noise(z0, noise).astype(np.float32)
            scale = np.float32(options["control_scale"])
            runs.append(SampleRun(schedule, styles[index % len(styles)], guidance, hint, noisy, scale))
    return runs


def encoder_feeds(rgb: Pixels) -> Feeds:
    """Inputs of the encoder for a picture [H, W, 3]."""
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1)[None], np.float32)
    return {"image": planes / np.float32(127.5) - np.float32(1)}


def decoder_feeds(bundle: Bundle, latent: Floats) -> Feeds:
    """Inputs of the decoder for the latent z₀ [1, 4, h, w]."""
    return {"latent": latent / np.float32(bundle.manifest.latent_scale)}


def denoise_run(bundle: Bundle, run: SampleRun, denoiser: Denoiser) -> Floats:
    """Denoise: → the last latent [1, 4, h, w]. `denoiser` is an engine, or is called like one."""
    solver, null, style = make_solver(run.schedule), bundle.null_style, bundle.open_style(run.style)
    latent = run.noisy
    for step in run.schedule.steps:
        row = style.stage(step.stage)
        halves = [null.stage(step.stage if null.stages > 1 else 0).kv_unet, row.kv_unet]
        feeds: Feeds = {
            "latent": latent,
            "hint": run.hint,
            "timestep": np.array([step.t], np.int64),
            "kv_unet": np.stack(halves[1 if run.guidance == 1 else 0 :])[:, None],
            "kv_control": row.kv_control[None],
            "control_scale": np.asarray(run.control_scale),
        }
        eps = denoiser(feeds)["eps"].copy()
        latent = np.asarray(solver.step(guide(eps, run.guidance), step.index, latent), np.float32)
    return latent


def repaint(
    bundle: Bundle,
    pictures: Sequence[Pixels],
    styles: Sequence[str],
    backend: str,
    seed: int = 0,
    folder: Path | None = None,
    compute_dtype: ComputeDtype = "fp32",
) -> list[Pixels]:
    """`pictures` repainted, [side, side, 3] each; the arguments are those of `prepare_runs`."""
    runs = prepare_runs(bundle, pictures, styles, backend, None, seed, folder, compute_dtype)
    with _opened(bundle, DENOISER, backend, folder, compute_dtype) as engine:
        latents = [denoise_run(bundle, run, engine) for run in runs]
    with _opened(bundle, VAE_DECODER, backend, folder, compute_dtype) as engine:
        images = [engine(decoder_feeds(bundle, latent))["image"][0].transpose(1, 2, 0).copy() for latent in latents]
    return [np.round(np.clip((image + 1) * 127.5, 0, 255)).astype(np.uint8) for image in images]


def _opened(
    bundle: Bundle, name: str, backend: str, folder: Path | None, compute_dtype: ComputeDtype
) -> closing[Engine]:
    path = bundle.graph_path(name)
    if folder is not None and (folder / path.name).is_file():
        path = folder / path.name
    return closing(open_engine(path, bundle.manifest.graphs[name], backend, "cpu", compute_dtype=compute_dtype))


def _square(rgb: Pixels, side: int) -> Pixels:
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(rgb), (side, side), Image.Resampling.LANCZOS), np.uint8)


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
