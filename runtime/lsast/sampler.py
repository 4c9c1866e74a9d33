"""The sampler of LSAST: picture → latent → noise → a style's hand, step by step → picture.

The four functions are the four graphs of a bundle, in the order in which one picture passes them. Symbols, after the
paper and its released code: z₀ the picture's latent, z_t the latent with the noise of step t, c_s the style's keys and
values of stage s = floor(t · stages / 1000), ε the noise that the U-Net sees in z_t, g the guidance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lsast_engines.engine import Engine
from lsast_engines.errors import BackendError
from lsast_engines.schedule import Schedule
from lsast_engines.solvers import Solver
from lsast_engines.style import Style
from lsast_engines.style_file import StyleFile

Floats = npt.NDArray[np.float32]
OnStep = Callable[[int, int], None]
"""Called with the number of steps done and the number there are, before the first step and after each."""


class NotFiniteError(BackendError):
    """A graph gave a NaN or an infinity: fp16 overflows at 65504."""


def hint_features(engine: Engine, edges: npt.NDArray[np.uint8]) -> Floats:
    """What the ControlNet reads of the picture's edges, the same at every step: [H, W] of 0 and 1 → [1, C, h, w]."""
    planes = np.broadcast_to(edges.astype(np.float32), (1, 3, *edges.shape))
    hint = run(engine, {"edges": np.ascontiguousarray(planes)})["hint"].copy()
    engine.rest()
    return hint


def encode(engine: Engine, rgb: npt.NDArray[np.uint8], scale: float, rng: np.random.Generator) -> Floats:
    """Sample the picture's latent, z₀ = scale · (mean + std · n): [H, W, 3] of 0 … 255 → [1, 4, h, w]."""
    image = np.ascontiguousarray(rgb.transpose(2, 0, 1)[None], dtype=np.float32) / np.float32(127.5) - np.float32(1)
    posterior = run(engine, {"image": image})
    noise = rng.standard_normal(posterior["mean"].shape, dtype=np.float32)
    latent = np.float32(scale) * (posterior["mean"] + posterior["std"] * noise)
    engine.rest()
    return latent


def denoise(
    engine: Engine,
    solver: Solver,
    schedule: Schedule,
    noisy: Floats,
    hint: Floats,
    style: Style | StyleFile,
    null: Style,
    guidance: float,
    control: float,
    on_step: OnStep | None = None,
) -> Floats:
    """The denoising loop: z_t of the schedule's first step [B, 4, h, w] → z₀.

    Args:
        engine: the `denoiser` graph.
        solver: takes z_t and ε to the next step's z_t.
        schedule: the steps to run, with the stage of each.
        noisy: the latent, noised to the schedule's first step.
        hint: what `hint_features` gave, [B, C, h, w].
        style: keys and values of the hand to paint with, the same for every picture of the batch; of a file, only the
            stages that are visited are read.
        null: keys and values of no style, which guidance leads away from.
        guidance: g in ε = ε_null + g · (ε_style - ε_null); at 1 the null half is not computed.
        control: what the ControlNet's residuals are multiplied with.
        on_step: told of every step; an exception that it raises ends the loop.
    """
    batch, total = noisy.shape[0], len(schedule.steps)
    engine.bind({"hint": hint, "control_scale": np.array(control, np.float32)})
    z = noisy
    stage = None
    if on_step:
        on_step(0, total)
    for index, step in enumerate(schedule.steps):
        if step.stage != stage:
            stage = step.stage
            engine.bind(_context(style, null, stage, batch, guided=guidance != 1))
        timestep = np.full(batch, step.t, np.int64)
        eps = run(engine, {"latent": z, "timestep": timestep})["eps"]  # [G, B, 4, h, w]
        eps_z = eps[0] if len(eps) == 1 else eps[0] + np.float32(guidance) * (eps[1] - eps[0])
        z = solver.step(eps_z, index, z)
        if on_step:
            on_step(index + 1, total)
    engine.rest()
    return z


def decode(engine: Engine, latent: Floats, scale: float) -> npt.NDArray[np.uint8]:
    """Paint the latent's picture: z₀ [1, 4, h, w] → [H, W, 3] of 0 … 255."""
    image = run(engine, {"latent": latent / np.float32(scale)})["image"][0]
    rgb: npt.NDArray[np.uint8] = np.round(np.clip((image.transpose(1, 2, 0) + 1) * 127.5, 0, 255)).astype(np.uint8)
    engine.rest()
    return rgb


def run(engine: Engine, feeds: dict[str, npt.NDArray[np.generic]]) -> dict[str, Floats]:
    """Run a graph once; the arrays it gives may be overwritten by its next run.

    Raises:
        NotFiniteError: an output holds a NaN or an infinity.
    """
    outputs = engine(feeds)
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            mend = "a smaller guidance" if engine.arithmetic == "fp32" else "arithmetic fp32, a smaller guidance"
            raise NotFiniteError(
                f"the {engine.spec.name} graph gave {np.count_nonzero(~np.isfinite(values))} values of {name} that are "
                f"not finite, on {engine.backend} in {engine.arithmetic}; try {mend}, or another backend"
            )
    return outputs


def _context(style: Style | StyleFile, null: Style, stage: int, batch: int, *, guided: bool) -> dict[str, Floats]:
    """Keys and values of one stage, for every picture of the batch: kv_unet [G, B, T, Wu], kv_control [B, T, Wc]."""
    hand = style.row(stage)
    nothing = null.row(stage if null.stages > 1 else 0)
    halves = np.stack([nothing.kv_unet, hand.kv_unet] if guided else [hand.kv_unet])
    return {
        "kv_unet": np.repeat(halves[:, None], batch, axis=1),
        "kv_control": np.repeat(hand.kv_control[None], batch, axis=0),
    }
