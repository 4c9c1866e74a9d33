"""The sampling algorithm of LSAST, from pictures to paintings, for a batch.

The other modules of this package make or wrap what it uses: `batch` holds the pictures with their styles and solvers,
`networks` runs the graphs, also with step caching, and `tiling` runs them on large canvases.
"""

from collections.abc import Callable

from lsast_engines.diffusion import guide

from .batch import Batch, BatchSolver
from .networks import Floats, Networks, Pixels


def sample(networks: Networks, batch: Batch, callback: Callable[[int, int, Floats], None]) -> tuple[Floats, Pixels]:
    """Repaint a batch of pictures: LSAST's inference (docs/method.md §4), in which E is the encoder, D the decoder::

        z0 = scale · E(picture);  z = α z0 + σ noise
        for each t:  eps = guide(U-Net + ControlNet at z, t, with the prompts of stage s(t));  z = solver(z, eps)
        painting = D(z / scale)

    Args:
        networks: the networks of the base, plain or wrapped.
        batch: what to paint, and how.
        callback: called before the first step and after each with the number of steps done, the number there are, and
            the predicted clean latent x0 [B, 4, h, w]. An exception that it raises ends the run.

    Returns:
        The painted latents [B, 4, h, w], and the paintings [B, H, W, 3].
    """
    mean, std = networks.vae_encoder(batch.pictures)  # [B, 4, h, w] each
    z0 = networks.latent_scale * (mean + std * batch.noise(mean.shape))
    hint = networks.controlnet_cond(batch.edges)  # [B, C, h, w]; once, because it does not depend on t
    z = batch.add_noise(z0, batch.noise(z0.shape))
    solver = BatchSolver(batch.samples, z0)  # a mask and a video blend the x0 (`X0Blend`)
    callback(0, batch.steps, z0)
    for step, (t, stages) in enumerate(batch.timesteps()):
        kv = batch.style(stages)  # keys and values of the prompt of stage s(t) = floor(t * stages / train_steps)
        feeds = {"latent": z, "timestep": t, "hint": hint, "control_scale": batch.control_scale, **kv._asdict()}
        eps = guide(networks.denoiser(feeds), batch.guidance)
        z = solver.step(eps, step, z)
        callback(step + 1, batch.steps, solver.x0)
    networks.denoiser.release_memory()
    return z, networks.vae_decoder(z / networks.latent_scale)
