"""The sampling algorithm of LSAST, and what it needs of the networks.

`sample` is the algorithm, from pictures to paintings, for a batch. The other modules of this package make or wrap what
it uses: `batch` holds the pictures with their styles and solvers, `networks` runs the graphs, also with step caching,
and `tiling` runs them on large canvases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lsast_engines.bundle.style import StageKV
from lsast_engines.diffusion import guide

from .batch import Batch
from .networks import Floats, Pixels

StepCallback = Callable[[int, int, Floats], None]
"""Called before the first step and after each with the number of steps done, the number there are, and the predicted
clean latent x0 [B, 4, h, w]. An exception that it raises ends the run."""


def sample(networks: Networks, batch: Batch, callback: StepCallback) -> tuple[Floats, Pixels]:
    """Repaint a batch of pictures: LSAST's inference (docs/method.md §4), in which E is the encoder, D the decoder::

        z0 = scale · E(picture);  z = α z0 + σ noise
        for each t:  eps = guide(U-Net + ControlNet at z, t, with the prompts of stage s(t));  z = solver(z, eps)
        painting = D(z / scale)

    Args:
        networks: the networks of the base, plain or wrapped.
        batch: what to paint, and how.
        callback: called before the first step and after each.

    Returns:
        The painted latents [B, 4, h, w], and the paintings [B, H, W, 3].
    """
    mean, std = networks.vae_encoder(batch.pictures)  # [B, 4, h, w] each
    z0 = networks.latent_scale * (mean + std * batch.noise(mean.shape))
    hint = networks.controlnet_cond(batch.edges)  # [B, C, h, w]; once, because it does not depend on t
    z = batch.add_noise(z0, batch.noise(z0.shape))
    solver = batch.solver(z0)  # a mask and a video blend the x0 (`X0Blend`)
    callback(0, batch.steps, z0)
    for step, (t, stages) in enumerate(batch.timesteps()):
        kv = batch.style(stages)  # keys and values of the prompt of stage s(t) = floor(t * stages / train_steps)
        eps = guide(networks.denoiser(z, t, hint, kv, batch.control_scale), batch.guidance)
        z = solver.step(eps, step, z)
        callback(step + 1, batch.steps, solver.x0)
    networks.denoiser.release_memory()
    return z, networks.vae_decoder(z / networks.latent_scale)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a base. In the shapes, H and W are in pixels, h and w in latent cells."""

    vae_encoder: Callable[[Pixels], Floats]
    """Pictures [B, H, W, 3] → mean and standard deviation of their latents, [2, B, 4, h, w]."""
    controlnet_cond: Callable[[Pixels], Floats]
    """Edges [B, H, W] of 0 and 1 → what the ControlNet reads of them, [B, C, h, w]."""
    denoiser: Denoiser
    vae_decoder: Callable[[Floats], Pixels]
    """Latents [B, 4, h, w] → pictures [B, H, W, 3]."""
    latent_scale: np.float32
    """The denoiser's latents are the autoencoder's times this."""


class Denoiser(Protocol):
    """U-Net and ControlNet. One object serves one run of `sample`, whose steps it is called for in their order."""

    def __call__(
        self, latent: Floats, timestep: npt.NDArray[np.int64], hint: Floats, style: StageKV, control_scale: Floats
    ) -> Floats:
        """Predict the noise.

        Args:
            latent: z_t [B, 4, h, w].
            timestep: t [B].
            hint: what `Networks.controlnet_cond` gave.
            style: kv_unet [G, B, T, Wu] and kv_control [B, T, Wc]; G is 2 with guidance (null first), else 1.
            control_scale: factor of the ControlNet's residuals, a scalar array.

        Returns:
            eps [G, B, 4, h, w].
        """

    def release_memory(self) -> None:
        """Give working memory back until the next call, see `Engine.release_memory`."""
