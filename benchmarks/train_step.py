"""What a training step costs on this machine: seconds and memory, before anyone waits for a hundred thousand."""

import time
from dataclasses import dataclass

import torch

from lsast_engines.environment import peak_memory
from lsast_train.base.base import Base
from lsast_train.evaluation import noise_error
from lsast_train.inversion import make_optimizer
from lsast_train.options import TrainOptions
from lsast_train.prompts.prompt_space import build_space
from lsast_train.training.rng import RngStream, rng_for


@dataclass(frozen=True)
class StepCost:
    """The cost of a step, without reading and encoding pictures."""

    seconds: float
    """Wall time of the fastest step."""
    peak_rss: int
    """Largest memory of the process so far in bytes, 0 if unknown; only a fresh process tells that of one setting."""
    loss: float
    """Loss of the last step; on random weights it says only that there was one."""


def training_step_cost(base: Base, options: TrainOptions, steps: int = 2) -> StepCost:
    """Take `steps` training steps on random latents and measure them.

    Args:
        base: moved to the CPU; with ``mixed_precision="bf16"`` its U-Net may be stored so (`Base.round_unet`).
        options: size, batch, generator, precision, gradient checkpointing and all else of a step.
        steps: how many; the first one also prepares what later ones reuse.

    Raises:
        UsageError: options that do not fit the base.
    """
    base.to(torch.device("cpu"), options.gradient_checkpointing)
    side = options.size // 8
    generator = rng_for(options.seed, RngStream.STEP)
    latents = torch.randn(options.batch, 4, side, side, generator=generator)
    space = build_space(base, options, lambda: latents)
    optimizer = make_optimizer(space, options)
    seconds, loss = [], torch.tensor(0.0)
    for _ in range(steps):
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(base.config.noise.train_steps, (options.batch,), generator=generator)
        began = time.perf_counter()
        loss = noise_error(base, space, latents, noise, timestep, options.mixed_precision, generator).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return StepCost(min(seconds), peak_memory() or 0, loss.item())
