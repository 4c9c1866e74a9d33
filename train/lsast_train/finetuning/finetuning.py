"""Fine-tuning: learned prompts are moved until the paintings that they give look like the artist's works.

::

    repeat:
        z0 = E(a crop of any picture), with the artist's palette; add noise up to the strength's timestep
        paint it with the sampler, guidance and edges
        move the prompts down the gradient of the style loss of D(the painted latent), through all steps

The gradient goes through the whole sampler, as in DRaFT and AlignProp (Clark et al. 2024, section 4; Prabhudesai et al.
2023, section 3).

Inversion (`lsast_train.inversion`) asks that the prompts explain noise on the works themselves; nothing there says what
a painting of another picture should look like.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsast_engines.bundle.style import encode_defaults

from ..base.base import Base, autocast
from ..options import identity
from ..paintings import PaintingDataset
from ..prompts.prompt_file import Prompts, save_prompts
from ..training.device import find_device, fused
from ..training.loop import TrainingLoop, require_finite, set_learning_rate
from ..training.rng import RngStream, rng_for
from ..training.run_files import RunFiles, RunResult, require_run, versions
from .options import FinetuneOptions
from .painter import Painter, PaintingOptions, random_pictures
from .style_loss import Distances, StyleLoss

log = logging.getLogger("lsast.train")

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
        sampler = PaintingOptions(options.strength, options.guidance, options.palette)
        self.painter = Painter(base, prompts, sampler, options.mixed_precision)
        self.prompts = nn.ParameterList([self.painter.prompts])
        self.painter.prompts = self.prompts[0]
        scale = prompts.prompts.square().mean().sqrt().item() or 1.0
        group = {"params": list(self.prompts.parameters()), "relative": scale}
        self.optimizer = torch.optim.Adam([group], lr=options.lr, betas=(0.8, 0.95), **fused(base.device))
        self.loss = StyleLoss(works.training, options.size, options.seed, base.device)
        self.loop = TrainingLoop(
            *(name, options, self.files.checkpoint),
            *({"prompts": self.prompts, "loss": self.loss}, self.optimizer),
            identity=self._identity(),
            resume=resume,
            device=base.device,
        )

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
        images, edges = random_pictures(
            self.contents.training, options.batch, options.size, generator, self.base.device
        )
        losses = self._losses(self.painter.paint(images, edges, generator), images, remember=True)
        loss = losses.total(options.content_weight)
        loss.backward()
        require_finite(loss.item(), step)
        self.optimizer.step()
        return loss.item()

    def _losses(self, latent: torch.Tensor, images: torch.Tensor, remember: bool) -> Distances:
        """The losses of painted latents [B, 4, h, w] of the pictures `images` [B, 3, H, W]."""
        base = self.base
        with autocast(base.device, self.options.mixed_precision):
            painted = base.decode((latent / base.config.latent_scale).contiguous(memory_format=torch.channels_last))
            losses: Distances = self.loss(painted, images, remember)
            return losses

    @torch.no_grad()
    def _evaluate(self, mean_loss: float | None) -> None:
        """The losses of held-out pictures, always the same with the same noise."""
        generator = rng_for(self.options.seed, RngStream.VALIDATION_CROPS)
        images, edges = random_pictures(
            self.contents.held_out, HELD_OUT, self.options.size, generator, self.base.device
        )
        losses = self._losses(self.painter.paint(images, edges, generator), images, remember=False)
        total = losses.total(self.options.content_weight)
        found = {"held_out": total.item(), **{key: part.item() for key, part in vars(losses).items()}}
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
            prompts=self.prompts[0].detach().cpu().clone(),
            meta=meta,
        )  # fmt: skip
        self.loop.write_log(self.files.curve)
        save_prompts(tuned, self.files.result)
        self.files.checkpoint.unlink(missing_ok=True)
        if end >= start:
            log.warning("the held-out loss did not fall: %.4f x that of the start; change --lr or --steps", end / start)
        return result

    def _identity(self) -> dict[str, Any]:
        return {
            **identity(self.options),
            "base": self.base.fingerprint,
            "prompts": f"{self.source.prompts.double().square().mean().item():.12g}",
            "paintings": self.works.digest,
            "contents": self.contents.digest,
        }
