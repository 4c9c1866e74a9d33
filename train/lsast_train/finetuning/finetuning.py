"""Fine-tuning: learned prompts are moved until the paintings that they give look like the artist's works.

::

    repeat:
        z0 = E(a crop of any picture), with the artist's palette; add noise up to the strength's timestep
        paint it with the sampler, guidance and edges
        move the prompts down the gradient of the style loss of D(the painted latent), through all steps

The gradient goes through the whole sampler, as in DRaFT and AlignProp (Clark et al. 2024, section 4; Prabhudesai et al.
2023, section 3). Each step is computed again in the backward pass, so that one step's activations are held at a time.

Inversion (`lsast_train.inversion`) asks that the prompts explain noise on the works themselves; nothing there says what
a painting of another picture should look like.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lsast_engines.bundle.style import LatentStatistics, encode_defaults
from lsast_engines.diffusion import NoiseLevel, TimestepSchedule, guide, make_solver
from lsast_engines.errors import StyleError
from lsast_engines.images import canny_edges

from ..base.attention import GROUPS
from ..base.base import Base, autocast
from ..options import identity
from ..paintings import Painting, PaintingDataset, encode_pictures, random_crop
from ..prompts.prompt_file import Prompts, save_prompts
from ..training.device import find_device, fused
from ..training.loop import TrainingLoop, require_finite, set_learning_rate
from ..training.rng import RngStream, rng_for
from ..training.run_files import RunFiles, RunResult, require_run, versions
from .options import FinetuneOptions
from .style_loss import Distances, StyleLoss, self_similarities

log = logging.getLogger("lsast.train")

SAMPLER_STEPS = 12
"""Steps of the whole schedule, of which `strength` runs the last part."""

SOLVER = "dpmpp2m"
"""The solver, as by default in mini's bundle."""

WORKS = 160
"""Crops of the artist's works that stand for all."""

HELD_OUT = 16
"""Pictures that an evaluation paints."""


class Finetuning:
    """One run.

    Args:
        base: moved to the device; its weights are never changed.
        prompts: of the style, learned on `base`.
        works: the artist's, loaded with the options' size.
        contents: pictures of any kind to paint, loaded with the options' size.
        options: of the run.
        name: of the new style.
        folder: for the files of the run.
        resume: go on from the checkpoint that a stopped run left in `folder`.
        on_step: called with the number of steps done and the loss after each step.
        device: in torch's words; None is a GPU of CUDA if one is there.

    Raises:
        UsageError: a device that is not there; a name that is no file name, or a size that the base cannot take.
        StyleError: prompts without the statistics of the artist's latents, which `palette` needs.
        TrainingError: a checkpoint that is missing, in the way, damaged, or of another run.
    """

    def __init__(
        self,
        base: Base,
        prompts: Prompts,
        works: PaintingDataset,
        contents: PaintingDataset,
        options: FinetuneOptions,
        name: str,
        folder: Path,
        resume: bool = False,
        on_step: Callable[[int, float], None] | None = None,
        device: str | None = None,
    ) -> None:
        self.files = RunFiles(folder, name)
        require_run(self.files, options.size, base.config.multiple, resume)
        self.base, self.source, self.works, self.contents = base, prompts, works, contents
        self.options, self.on_step = options, on_step
        base.to(find_device(device))
        self.palette = self._palette()
        self.prompts = _PromptTensor(prompts.prompts).to(base.device)
        scale = prompts.prompts.square().mean().sqrt().item() or 1.0
        group = {"params": list(self.prompts.parameters()), "relative": scale}
        self.optimizer = torch.optim.Adam([group], lr=options.lr, betas=(0.8, 0.95), **fused(base.device))
        generator = rng_for(options.seed, RngStream.TRAINING_CROPS)
        shown = works.training[:WORKS]
        crops = [random_crop(shown[index % len(shown)], options.size, generator) for index in range(WORKS)]
        self.loss = StyleLoss(np.stack(crops), base.device)
        self.loop = TrainingLoop(
            *(name, options.steps, self.files.checkpoint),
            *({"prompts": self.prompts, "loss": self.loss}, self.optimizer),
            identity=self._identity(),
            evaluate_every=options.evaluate_every,
            checkpoint_minutes=options.checkpoint_minutes,
            device=base.device,
        )
        if resume:
            self.loop.restore()

    def run(self) -> RunResult:
        """Train to the last step and write its prompts.

        Raises:
            TrainingError: a loss that is not finite.
            InterruptionError: SIGINT or SIGTERM; a checkpoint was written.
        """
        if not self.loop.history:
            self._evaluate(None)
        self.loop.run(self._train_step, self._evaluate, self.on_step)
        return self._finish()

    def _train_step(self, step: int) -> float:
        options, generator = self.options, rng_for(self.options.seed, RngStream.STEP, step)
        set_learning_rate(self.optimizer, options.learning_rate(step))
        self.optimizer.zero_grad(set_to_none=True)
        images, edges = self._pictures(self.contents.training, options.batch, generator)
        loss = self._total(self._losses(self._paint(images, edges, generator), images, remember=True))
        loss.backward()
        require_finite(loss.item(), step)
        self.optimizer.step()
        return loss.item()

    def _losses(self, latent: torch.Tensor, images: torch.Tensor, remember: bool) -> Distances:
        """The losses of painted latents [B, 4, h, w] of the pictures `images` [B, 3, H, W]."""
        base = self.base
        with autocast(base.device, self.options.mixed_precision):
            with torch.no_grad():
                content = self_similarities(self.loss.features(images))
            painted = base.decode((latent / base.config.latent_scale).contiguous(memory_format=torch.channels_last))
            losses: Distances = self.loss(painted, content, remember)
            return losses

    def _total(self, losses: Distances) -> torch.Tensor:
        return losses.style + self.options.content_weight * losses.content

    def _paint(self, images: torch.Tensor, edges: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Painted latents [B, 4, h, w] of images [B, 3, H, W]."""
        base, options = self.base, self.options
        pixels = ((images.cpu() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        with torch.no_grad():
            latent = encode_pictures(base, list(pixels))[0] * base.config.latent_scale
        stages = len(self.source.prompts)
        schedule = TimestepSchedule.build(base.config.noise, SAMPLER_STEPS, options.strength, stages, SOLVER)
        noise = torch.randn(latent.shape, generator=generator)
        z = torch.from_numpy(schedule.add_noise(self._matched(latent).numpy(), noise.numpy())).to(base.device)
        solver: Any = make_solver(schedule)  # its arithmetic is the same on tensors
        for step in schedule.steps:
            x0 = checkpoint(self._x0, z, step.t, edges, use_reentrant=False)
            level = self._level(step.t)
            z = solver.step((z - level.alpha * x0) / level.sigma, step.index, z)
        return z

    def _x0(self, z: torch.Tensor, timestep: int, edges: torch.Tensor) -> torch.Tensor:
        """The guided data prediction [B, 4, h, w] at the latents `z`, with the palette's limit."""
        base, options = self.base, self.options
        stage = timestep * len(self.source.prompts) // base.config.noise.train_steps
        own = self.prompts.values[stage].expand(len(z), -1, -1, -1)
        null = base.null_context.expand(len(z), len(GROUPS), -1, -1)
        times = torch.full((len(z),), timestep, device=base.device)
        with autocast(base.device, options.mixed_precision):
            residuals = base.control(z, times, own, edges)
            eps = base.eps(z, times, own, residuals=residuals).float()
            if options.guidance != 1:
                unguided = base.eps(z, times, null, residuals=residuals).float()
                eps = guide(torch.stack([unguided, eps]), options.guidance)
        level = self._level(timestep)
        x0 = (z - level.sigma * eps) / level.alpha
        mean, std = x0.mean((2, 3), keepdim=True), x0.std((2, 3), correction=0, keepdim=True)
        excess = (x0 - mean) * (1 - (self.palette[1].to(x0) / std.clamp(min=1e-3)).clamp(max=1))
        limited: torch.Tensor = x0 - options.palette * excess
        return limited

    def _matched(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents [B, 4, h, w] in the artist's palette, as the runtime's option `palette` does it."""
        mean, std = latent.mean((2, 3), keepdim=True), latent.std((2, 3), correction=0, keepdim=True)
        matched = self.palette[0] + (latent - mean) * (self.palette[1] / std.clamp(min=1e-3))
        return latent + self.options.palette * (matched - latent)

    def _level(self, timestep: int) -> NoiseLevel:
        return NoiseLevel.of(float(self.base.alphas_cumprod[timestep]))

    def _pictures(
        self, paintings: Sequence[Painting], count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random crops as images [B, 3, H, W] in [-1, 1], and their edges [B, 3, H, W] of 0 and 1."""
        crops = []
        for index in torch.randint(len(paintings), (count,), generator=generator).tolist():
            crop = random_crop(paintings[index], self.options.size, generator)
            crops.append(crop[:, ::-1] if torch.randint(2, (), generator=generator) else crop)
        edges = torch.from_numpy(np.stack([canny_edges(crop) for crop in crops])).float()[:, None].expand(-1, 3, -1, -1)
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images.to(self.base.device, memory_format=torch.channels_last), edges.to(self.base.device)

    @torch.no_grad()
    def _evaluate(self, mean_loss: float | None) -> None:
        """The losses of held-out pictures, always the same with the same noise."""
        generator = rng_for(self.options.seed, RngStream.VALIDATION_CROPS)
        images, edges = self._pictures(self.contents.held_out, HELD_OUT, generator)
        losses = self._losses(self._paint(images, edges, generator), images, remember=False)
        found = {"held_out": self._total(losses).item(), **{key: part.item() for key, part in vars(losses).items()}}
        self.loop.history.append({"step": self.loop.step, "training": mean_loss, **found})
        log.info("step %d: held-out loss: %.4f (style %.4f, content %.4f)", self.loop.step, *found.values())

    def _finish(self) -> RunResult:
        start, end = (self.loop.history[index]["held_out"] for index in (0, -1))
        result = RunResult(
            *(self.files.result, self.files.curve, self.loop.step, self.loop.step), end / start, self.loop.seconds
        )
        options = self.options
        defaults = {"strength": options.strength, "guidance": options.guidance, "palette": options.palette}
        meta = {
            **self.source.meta,
            **encode_defaults(defaults),
            "finetuned": json.dumps(asdict(options), sort_keys=True),
            "finetuned_relative_loss": f"{end / start:.6f}",
            "contents_sha256": self.contents.digest,
            "versions": json.dumps(versions()),
        }
        tuned = replace(
            self.source,
            name=self.files.name,
            base=self.base.fingerprint,
            # Every stage and layer group has a prompt of its own now, in the space of the contexts.
            variant="step+layer", generator="direct", layout="strided", gradient="all", embeddings=None,
            prompts=self.prompts.values.detach().cpu().clone(),
            meta=meta,
        )  # fmt: skip
        self.loop.write_log(self.files.curve, asdict(options))
        save_prompts(tuned, self.files.result)
        self.files.checkpoint.unlink(missing_ok=True)
        if end >= start:
            log.warning("the held-out loss did not fall: %.4f x that of the start; change --lr or --steps", end / start)
        return result

    def _palette(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the artist's latents, [4, 1, 1] each, on the CPU."""
        statistics, faults = LatentStatistics.from_meta(self.source.meta)
        if statistics is None:
            found = faults[0] if faults else "no statistics of the artist's latents"
            raise StyleError(f"found prompts with {found}; expected some: learn them again with lsast-train")
        mean, std = (torch.tensor(values)[:, None, None] for values in (statistics.mean, statistics.std))
        return mean, std

    def _identity(self) -> dict[str, Any]:
        return {
            **identity(self.options),
            "base": self.base.fingerprint,
            "prompts": f"{self.source.prompts.double().square().mean().item():.12g}",
            "paintings": self.works.digest,
            "contents": self.contents.digest,
        }


class _PromptTensor(nn.Module):
    """The prompts [stages, 3, T, dim], as a parameter."""

    def __init__(self, prompts: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(prompts.clone())
