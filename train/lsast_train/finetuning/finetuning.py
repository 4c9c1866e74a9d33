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

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from lsast_engines.bundle.style import encode_defaults

from ..base.base import Base, autocast
from ..options import FinetuneOptions
from ..paintings import PaintingDataset, to_images
from ..prompts.prompt_file import Prompts, save_prompts
from ..training.loop import TrainingLoop
from ..training.rng import RngStream, rng_for
from ..training.run import RunFiles, RunResult, find_device, fused, versions
from .painter import Painter, random_pictures
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
        contents: pictures of any kind to paint, loaded likewise.
        name, folder, resume, device: as of `lsast_train.inversion.Inversion`; without a device a GPU, if one is there.

    Raises:
        UsageError, TrainingError: as `Inversion`.
        StyleError: as `Painter`.
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
        device: str | None = None,
    ) -> None:
        self.files = RunFiles(folder, name)
        self.files.require(options.size, base.config.multiple, resume)
        self.base, self.source, self.works, self.contents, self.options = base, prompts, works, contents, options
        base.to(find_device(device))
        self.defaults = {name: getattr(options, name) for name in ("strength", "guidance", "palette")}
        self.painter = Painter(base, prompts, mixed_precision=options.mixed_precision, **self.defaults)
        self.prompts = nn.ParameterList([self.painter.prompts])
        self.painter.prompts = self.prompts[0]
        scale = prompts.prompts.square().mean().sqrt().item() or 1.0
        group = {"params": list(self.prompts.parameters()), "relative": scale}
        self.optimizer = torch.optim.Adam([group], lr=options.lr, betas=(0.8, 0.95), **fused(base.device))
        self.loss = StyleLoss(works.training, options.size, options.seed, base.device)
        self.loop = TrainingLoop(
            *(name, options, self.files.checkpoint),
            *({"prompts": self.prompts, "loss": self.loss}, self.optimizer),
            identity={
                **options.identity(),
                "base": base.fingerprint,
                "prompts": f"{prompts.prompts.double().square().mean().item():.12g}",
                "paintings": works.digest,
                "contents": contents.digest,
            },
            resume=resume,
            device=base.device,
        )

    def run(self) -> RunResult:
        """Train to the last step and write its prompts; errors are those of `TrainingLoop.run` and `finishing`."""
        if not self.loop.history:
            self._evaluate(None)
        self.loop.run(self._train_step, self._evaluate)
        with self.loop.finishing(self.files.result):
            return self._finish()

    def _train_step(self, step: int) -> float:
        options = self.options
        losses = self._losses(options.batch, rng_for(options.seed, RngStream.STEP, step), training=True)
        return self.loop.descend(losses.total(options.content_weight), options.learning_rate(step))

    def _losses(self, count: int, generator: torch.Generator, training: bool) -> Distances:
        """The losses of `count` pictures that are painted."""
        base, pictures = self.base, self.contents.training if training else self.contents.held_out
        chosen = random_pictures(pictures, count, self.options.size, generator)
        latent = self.painter.paint(chosen, generator) / base.config.latent_scale
        with autocast(base.device, self.options.mixed_precision):
            painted = base.decode(latent.contiguous(memory_format=torch.channels_last))
            losses: Distances = self.loss(painted, to_images(chosen, base.device), training)
            return losses

    @torch.no_grad()
    def _evaluate(self, mean_loss: float | None) -> None:
        """The losses of held-out pictures, always the same with the same noise."""
        losses = self._losses(HELD_OUT, rng_for(self.options.seed, RngStream.VALIDATION_CROPS), training=False)
        total = losses.total(self.options.content_weight)
        found = {"held_out": total.item(), **{key: part.item() for key, part in vars(losses).items()}}
        self.loop.history.append({"step": self.loop.step, "training": mean_loss, **found})
        log.info("step %d: held-out loss: %.4f (style %.4f, content %.4f)", self.loop.step, *found.values())

    def _finish(self) -> RunResult:
        start, end = (self.loop.history[index]["held_out"] for index in (0, -1))
        result = RunResult(
            *(self.files.result, self.files.curve, self.loop.step, self.loop.step), end / start, self.loop.seconds
        )
        meta = {
            **self.source.meta,
            **encode_defaults(self.defaults),
            "finetuned": json.dumps(asdict(self.options), sort_keys=True),
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
        if end >= start:
            log.warning("the held-out loss did not fall: %.4f x that of the start; change --lr or --steps", end / start)
        return result
