"""A style's painter: the runtime's sampler in torch, so that gradients go through all of its steps.

Each step is computed again in the backward pass, so that one step's activations are held at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from lsast_engines.bundle.style import LatentStatistics
from lsast_engines.diffusion import TimestepSchedule, guide, make_solver
from lsast_engines.errors import StyleError

from ..base.base import Base, autocast
from ..base.projection import GROUPS
from ..options import MixedPrecision
from ..paintings import Painting, encode_pictures, random_crop, to_edges
from ..prompts.prompt_file import Prompts

SAMPLER_STEPS = 12
"""Steps of the whole schedule, of which `strength` runs the last part."""

SOLVER = "dpmpp2m"
"""The solver, as by default in mini's bundle."""


class Painter:
    """Paints pictures in a style; strength, guidance and palette are those of `lsast.Options`.

    `StyleError` for prompts without the statistics of the artist's latents.
    """

    def __init__(
        self,
        base: Base,
        prompts: Prompts,
        *,
        strength: float,
        guidance: float,
        palette: float,
        mixed_precision: MixedPrecision,
    ) -> None:
        self.base, self.strength, self.guidance, self.share = base, strength, guidance, palette
        self.mixed_precision = mixed_precision
        self.prompts = prompts.prompts.clone().to(base.device)
        """[stages, 3, T, dim]; gradients go to it if it asks for them."""
        statistics, faults = LatentStatistics.from_meta(prompts.meta)
        if statistics is None:
            found = faults[0] if faults else "no statistics of the artist's latents"
            raise StyleError(f"found prompts with {found}; expected some: learn them again with lsast-train")
        mean, std = (torch.tensor(values)[:, None, None] for values in (statistics.mean, statistics.std))
        self.palette = mean, std
        """Mean and deviation of the artist's latents, [4, 1, 1] each, on the CPU."""

    def paint(self, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Painted latents [B, 4, h, w] in the U-Net's scale, of pictures [B, H, W, 3] uint8."""
        base, edges = self.base, to_edges(pictures).to(self.base.device)
        latent = encode_pictures(base, list(pictures.numpy()))[0] * base.config.latent_scale
        stages = len(self.prompts)
        schedule = TimestepSchedule.build(base.config.noise, SAMPLER_STEPS, self.strength, stages, SOLVER)
        noise = torch.randn(latent.shape, generator=generator)
        z = torch.from_numpy(schedule.add_noise(self.match(latent).numpy(), noise.numpy())).to(base.device)
        solver: Any = make_solver(schedule)  # its arithmetic is the same on tensors
        for step in schedule.steps:
            x0 = checkpoint(self.x0, z, step.t, edges, use_reentrant=False)
            level = base.config.noise.level(step.t)
            z = solver.step((z - level.alpha * x0) / level.sigma, step.index, z)
        return z

    def match(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents [B, 4, h, w] in the artist's palette, as the runtime's option `palette` does it."""
        mean, std = latent.mean((2, 3), keepdim=True), latent.std((2, 3), correction=0, keepdim=True)
        matched = self.palette[0] + (latent - mean) * (self.palette[1] / std.clamp(min=1e-3))
        return latent + self.share * (matched - latent)

    def x0(self, z: torch.Tensor, timestep: int, edges: torch.Tensor) -> torch.Tensor:
        """The guided data prediction [B, 4, h, w] at the latents `z`, with the palette's limit."""
        base = self.base
        stage = timestep * len(self.prompts) // base.config.noise.train_steps
        own = self.prompts[stage].expand(len(z), -1, -1, -1)
        null = base.null_context.expand(len(z), len(GROUPS), -1, -1)
        times = torch.full((len(z),), timestep, device=base.device)
        with autocast(base.device, self.mixed_precision):
            residuals = base.control(z, times, own, edges)
            eps = base.eps(z, times, own, residuals=residuals).float()
            if self.guidance != 1:
                uncond = base.eps(z, times, null, residuals=residuals).float()
                eps = guide(torch.stack([uncond, eps]), self.guidance)
        level = base.config.noise.level(timestep)
        x0 = (z - level.sigma * eps) / level.alpha
        mean, std = x0.mean((2, 3), keepdim=True), x0.std((2, 3), correction=0, keepdim=True)
        excess = (x0 - mean) * (1 - (self.palette[1].to(x0) / std.clamp(min=1e-3)).clamp(max=1))
        limited: torch.Tensor = x0 - self.share * excess
        return limited


def random_pictures(paintings: Sequence[Painting], count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random crops, half of them mirrored, [B, size, size, 3] uint8."""
    crops = []
    for index in torch.randint(len(paintings), (count,), generator=generator).tolist():
        crop = random_crop(paintings[index], size, generator)
        crops.append(crop[:, ::-1] if torch.randint(2, (), generator=generator) else crop)
    return torch.from_numpy(np.stack(crops))
