"""The sampler of LSAST: picture → latent → noise → a style's hand, step by step → picture.

The four functions are the four graphs of a bundle, in the order in which one picture passes them; the denoiser takes
several at once. Symbols, after the
paper and its released code: z₀ the picture's latent, z_t the latent with the noise of step t, c_s the style's keys and
values of stage s = floor(t · stages / 1000), ε the noise that the U-Net sees in z_t, g the guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lsast_engines.backends.base import Engine
from lsast_engines.bundle.style import Style
from lsast_engines.bundle.style_file import StyleFile
from lsast_engines.diffusion.guidance import guide
from lsast_engines.diffusion.solvers import Solver
from lsast_engines.diffusion.timesteps import TimestepSchedule
from lsast_engines.errors import BackendError

from ..options.style_mix import Hand
from .x0_blend import X0Blend

Floats = npt.NDArray[np.float32]
Watch = Callable[[int, int, Sequence[Floats]], None]
"""Called before the first step and after each with the number of steps done, the number there are, and what each row's
clean latent is taken to be, [4, h, w]."""


class NotFiniteError(BackendError):
    """A graph gave a NaN or an infinity: fp16 overflows at 65504."""


def hint_features(engine: Engine, edges: npt.NDArray[np.uint8]) -> Floats:
    """What the ControlNet reads of the picture's edges, the same at every step: [H, W] of 0 and 1 → [1, C, h, w]."""
    planes = np.broadcast_to(edges.astype(np.float32), (1, 3, *edges.shape))
    hint = run(engine, {"edges": np.ascontiguousarray(planes)})["hint"].copy()
    engine.release_memory()
    return hint


def encode(engine: Engine, rgb: npt.NDArray[np.uint8], scale: float, rng: np.random.Generator) -> Floats:
    """Sample the picture's latent: [H, W, 3] of 0 … 255 → z₀ [1, 4, h, w]."""
    return drawn(*posterior(engine, rgb), scale, rng)


def posterior(engine: Engine, rgb: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the picture's latent: [H, W, 3] of 0 … 255 → [1, 4, h, w] each."""
    image = np.ascontiguousarray(rgb.transpose(2, 0, 1)[None], dtype=np.float32) / np.float32(127.5) - np.float32(1)
    outputs = run(engine, {"image": image})
    mean, std = outputs["mean"].copy(), outputs["std"].copy()
    engine.release_memory()
    return mean, std


def drawn(mean: Floats, std: Floats, scale: float, rng: np.random.Generator) -> Floats:
    """A latent of such a mean and deviation, z₀ = scale · (mean + std · n)."""
    noise = rng.standard_normal(mean.shape, dtype=np.float32)
    return np.float32(scale) * (mean + std * noise)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture of a batch on its way through the denoiser; every row may be painted in its own way."""

    solver: Solver
    """Takes z_t and ε to the next step's z_t; no other row's."""
    schedule: TimestepSchedule
    """The steps to run, with the stage of each; of all rows equally many."""
    z0: Floats
    """The picture's own latent, [4, h, w]."""
    noisy: Floats
    """The latent, noised to the schedule's first step, [4, h, w]."""
    hint: Floats
    """What `hint_features` gave, [C, h, w]."""
    hand: Hand | Style | StyleFile
    """Keys and values to paint with; of a file, only the stages that are visited are read."""
    guidance: float
    """g in ε = ε_null + g · (ε_style - ε_null); 1 in all rows or in none, for the null half is then not computed."""


def denoise(
    engine: Engine,
    rows: Sequence[Row],
    null: Style,
    control: float,
    watch: Watch | None = None,
) -> list[Floats]:
    """The denoising loop: z_t of the schedules' first step → z₀, of every row [4, h, w].

    Args:
        engine: the `denoiser` graph, or what stands for it (`parted`).
        rows: the batch.
        null: keys and values of no style, which guidance leads away from.
        control: what the ControlNet's residuals are multiplied with.
        watch: told of every step; an exception that it raises ends the loop.
    """
    total = len(rows[0].schedule.steps)
    guided = rows[0].guidance != 1
    engine.bind_inputs({"hint": np.stack([row.hint for row in rows]), "control_scale": np.array(control, np.float32)})
    latents = [row.noisy for row in rows]
    bound: list[int] | None = None
    if watch:
        watch(0, total, [row.z0 for row in rows])
    for index in range(total):
        steps = [row.schedule.steps[index] for row in rows]
        stages = [step.stage for step in steps]
        if bound != (bound := stages):
            engine.bind_inputs(_context(rows, null, stages, guided=guided))
        timesteps = np.array([step.t for step in steps], np.int64)
        eps = run(engine, {"latent": np.stack(latents), "timestep": timesteps})["eps"]  # [G, B, 4, h, w]
        guesses = []
        for place, row in enumerate(rows):
            z = latents[place]
            eps_z = guide(eps[:, place], row.guidance)
            latents[place] = row.solver.step(eps_z, index, z)
            if watch:
                guesses.append(_predicted_x0(row, eps_z, index, z))
        if watch:
            watch(index + 1, total, guesses)
    engine.release_memory()
    return latents


def _predicted_x0(row: Row, eps: Floats, index: int, z: Floats) -> Floats:
    """What the step that was just taken from `z` took the clean latent to be."""
    if isinstance(row.solver, X0Blend):
        return row.solver.x0
    abar = row.schedule.abars()[index]
    alpha, sigma = np.float32(abar**0.5), np.float32((1 - abar) ** 0.5)
    return np.asarray((z - sigma * eps) / alpha, np.float32)


def decode(engine: Engine, latent: Floats, scale: float) -> npt.NDArray[np.uint8]:
    """Paint the latent's picture: z₀ [1, 4, h, w] → [H, W, 3] of 0 … 255."""
    return to_pixels(paint(engine, latent, scale))


def paint(engine: Engine, latent: Floats, scale: float) -> Floats:
    """The latent's picture before it is rounded: z₀ [1, 4, h, w] → [H, W, 3], about 0 … 255."""
    image = run(engine, {"latent": latent / np.float32(scale)})["image"][0]
    levels: Floats = (image.transpose(1, 2, 0) + 1) * 127.5
    engine.release_memory()
    return levels


def to_pixels(levels: Floats) -> npt.NDArray[np.uint8]:
    """Grey levels as bytes: rounded, and what is beyond 0 … 255 cut off."""
    rgb: npt.NDArray[np.uint8] = np.round(np.clip(levels, 0, 255)).astype(np.uint8)
    return rgb


def run(engine: Engine, feeds: dict[str, npt.NDArray[np.generic]]) -> dict[str, Floats]:
    """Run a graph once; the arrays it gives may be overwritten by its next run.

    Raises:
        NotFiniteError: an output holds a NaN or an infinity.
    """
    outputs = engine(feeds)
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            mend = "a smaller guidance" if engine.compute_dtype == "fp32" else "compute_dtype fp32, a smaller guidance"
            raise NotFiniteError(
                f"the {engine.spec.name} graph gave {np.count_nonzero(~np.isfinite(values))} values of {name} that are "
                f"not finite, on {engine.backend} in {engine.compute_dtype}; try {mend}, or another backend"
            )
    return outputs


def _context(rows: Sequence[Row], null: Style, stages: Sequence[int], *, guided: bool) -> dict[str, Floats]:
    """Keys and values of the stage of every row: kv_unet [G, B, T, Wu], kv_control [B, T, Wc]."""
    hands = [row.hand.row(stage) for row, stage in zip(rows, stages, strict=True)]
    halves = [[hand.kv_unet for hand in hands]]
    if guided:
        halves.insert(0, [null.row(stage if null.stages > 1 else 0).kv_unet for stage in stages])
    return {
        "kv_unet": np.stack([np.stack(half) for half in halves]),
        "kv_control": np.stack([hand.kv_control for hand in hands]),
    }
