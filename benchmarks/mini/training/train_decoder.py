"""The decoder learns on what the styles of its base paint, so that the paintings have the artists' touch.

::

    paint pictures in every style, once, and keep the latents z
    repeat, with each style in turn:
        loss = style loss of D(z) + content loss of D(z) + reconstruction loss of D(E(x)), for real pictures x
        move the decoder D down the gradient of the loss

A decoder that has only seen the encoder's latents prints a fine pattern over those of a sampler, and softens the touch
that tells one painter from another. Encoder, U-Net, ControlNet and prompts stay as they are, so styles stay valid. The
style loss and the content loss are those of `lsast_train.finetuning.finetuning`, which trains prompts. After it the
prompts may be fine-tuned again with the new decoder.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lsast_engines.bundle.style import decode_defaults
from lsast_engines.declared_options import Range
from lsast_engines.errors import UsageError
from lsast_train.base.base import Base, autocast
from lsast_train.base.mini_networks import MiniAutoencoder
from lsast_train.finetuning.finetuning import HELD_OUT
from lsast_train.finetuning.painter import Painter, random_pictures
from lsast_train.finetuning.perceptual import LiteDistance
from lsast_train.finetuning.style_loss import Distances, StyleLoss
from lsast_train.options import FinetuneOptions, RunOptions
from lsast_train.paintings import PaintingDataset, random_crop, to_images
from lsast_train.prompts.prompt_file import Prompts
from lsast_train.training.loop import TrainingLoop
from lsast_train.training.rng import RngStream, rng_for
from lsast_train.training.run import RunFiles, find_device, fused

from .ema import update_ema
from .finetune_gan import LOSS_WEIGHTS, texture_loss

log = logging.getLogger("lsast.train")

LR_WARMUP = 20
"""Steps in which the learning rate rises."""

EMA = 0.99
"""Decay of the running mean of the decoder's weights, which is the result."""

REAL_CROPS, REAL_SIDE = 6, 128
"""Crops of real pictures in a step and their side in pixels."""

_PAINTED_AT_ONCE = 8 * 256**2
"""Pixels of the pictures that are painted together."""


@dataclass(frozen=True)
class DecoderOptions(RunOptions):
    """How a decoder is trained on the paintings of a base's styles."""

    steps: Annotated[int, "Optimiser steps; each is of one style, in turn.", Range(1)] = 400
    batch: Annotated[int, "Paintings that are decoded in a step.", Range(2)] = 6
    paintings: Annotated[int, "Pictures that each style paints beforehand.", Range(1)] = 96
    lr: Annotated[float, "Learning rate at its highest.", Range(0, above=True)] = 2e-4
    """It rises over the first `LR_WARMUP` steps and falls to zero by half a cosine."""
    size: Annotated[int, "Side of a picture that is painted, in pixels.", Range(64)] = 256
    content_weight: Annotated[float, "Weight of the loss of content.", Range(0)] = 9.0
    reconstruction_weight: Annotated[float, "Weight of what real pictures lose by encoding and decoding.", Range(0)] = (
        1.0
    )
    mixed_precision: Annotated[Literal["auto", "no", "bf16"], "Autocast of the networks."] = "auto"
    seed: Annotated[int, "Seed of all random numbers.", Range(0)] = 0
    evaluate_every: Annotated[int, Range(1)] = 100
    """Steps between two evaluations on held-out pictures."""
    checkpoint_minutes: Annotated[float, Range(0, above=True)] = field(default=2.0, compare=False)
    """Minutes between two checkpoints."""

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        return min(1.0, (step + 1) / LR_WARMUP) * super().learning_rate(step)


@dataclass(frozen=True)
class StyleWorks:
    """A style, and the works of its artist, loaded with the options' size."""

    prompts: Prompts
    works: PaintingDataset


@dataclass(frozen=True)
class _Paintings:
    """Pictures [N, H, W, 3] uint8 and their painted latents [N, 4, h, w], on the CPU."""

    pictures: torch.Tensor
    latents: torch.Tensor


class DecoderTraining:
    """One run. Making it paints all pictures, which takes minutes and writes nothing; `run` trains.

    Args:
        base: moved to the device; the decoder of its autoencoder is trained in place.
        styles: by name. Each paints with its own default options, or else with those of `FinetuneOptions`.
        folder: for ``decoder.curve.json``, and ``decoder.checkpoint.safetensors`` while the run is unfinished.
        contents, options, resume, device: as of `Finetuning`.

    Raises:
        UsageError, StyleError, TrainingError: as `Finetuning`; no style, or an autoencoder that is not mini's.
    """

    def __init__(
        self,
        base: Base,
        styles: Mapping[str, StyleWorks],
        contents: PaintingDataset,
        options: DecoderOptions,
        folder: Path,
        resume: bool = False,
        device: str | None = None,
    ) -> None:
        if not isinstance(base.autoencoder, MiniAutoencoder):
            raise UsageError(f"found the base {base.config.name!r}; expected one with mini's autoencoder")
        if not styles:
            raise UsageError("found no style; expected one or more")
        self.files = RunFiles(folder, "decoder")
        self.files.require(options.size, base.config.multiple, resume)
        self.base, self.styles, self.contents, self.options = base, styles, contents, options
        base.to(find_device(device))
        painters = {name: self._painter(style.prompts) for name, style in styles.items()}
        self.losses = {
            name: StyleLoss(style.works.training, options.size, options.seed, base.device)
            for name, style in styles.items()
        }
        self.lite = LiteDistance(base.device)
        self.decoder = base.autoencoder.decoder
        self.decoder.requires_grad_(True)
        self.ema = copy.deepcopy(self.decoder).requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            self.decoder.parameters(), lr=options.lr, betas=(0.9, 0.98), **fused(base.device)
        )
        losses = torch.nn.ModuleList(self.losses.values())  # a module's name cannot hold the dot that a style's may
        self.loop = TrainingLoop(
            *("decoder", options, self.files.checkpoint),
            *({"decoder": self.decoder, "ema": self.ema, "losses": losses}, self.optimizer),
            identity=self._identity(),
            resume=resume,
            device=base.device,
        )
        self.paintings: dict[str, dict[str, _Paintings]] = {}
        for index, (name, painter) in enumerate(painters.items()):
            log.info("%s: painting %d pictures to train on and %d held out", name, options.paintings, HELD_OUT)
            self.paintings[name] = self._paint_pictures(painter, index)

    def run(self) -> None:
        """Train to the last step; the base's decoder ends with the running mean of its weights, frozen, on the CPU.

        The checkpoint stays, so that nothing is lost until the caller has written the base. Errors are those of
        `TrainingLoop.run`.
        """
        if not self.loop.history:
            self._evaluate(None)
        self.loop.run(self._train_step, self._evaluate)
        self.decoder.load_state_dict(self.ema.state_dict())
        self.decoder.requires_grad_(False)
        self.base.to(torch.device("cpu"))
        self.loop.write_log(self.files.curve)
        self.loop.save()

    def _painter(self, prompts: Prompts) -> Painter:
        """Paints with the style's own default options."""
        own = {name: getattr(FinetuneOptions(), name) for name in ("strength", "guidance", "palette")}
        own |= {name: value for name, value in decode_defaults(prompts.meta)[0].items() if name in own}
        return Painter(self.base, prompts, mixed_precision=self.options.mixed_precision, **own)

    @torch.no_grad()
    def _paint_pictures(self, painter: Painter, index: int) -> dict[str, _Paintings]:
        """What the painter of the style of this number paints of training and of held-out pictures."""
        options, found = self.options, {}
        at_once = max(1, _PAINTED_AT_ONCE // options.size**2)
        parts = {"training": options.paintings, "held_out": HELD_OUT}
        for number, (part, count) in enumerate(parts.items()):
            generator = rng_for(options.seed, RngStream.CONTENT, index, number)
            rows = []
            for begin in tqdm(range(0, count, at_once), desc="paint", unit="batch"):
                several = min(at_once, count - begin)
                pictures = random_pictures(getattr(self.contents, part), several, options.size, generator)
                rows.append((pictures, painter.paint(pictures, generator).cpu()))
            found[part] = _Paintings(*map(torch.cat, zip(*rows, strict=True)))
        return found

    def _train_step(self, step: int) -> float:
        options, generator = self.options, rng_for(self.options.seed, RngStream.STEP, step)
        name = list(self.styles)[step % len(self.styles)]
        paintings = self.paintings[name]["training"]
        rows = torch.randint(len(paintings.latents), (options.batch,), generator=generator)
        distances = self._distances(name, paintings, rows, remember=True)
        loss = distances.total(options.content_weight) + options.reconstruction_weight * self._reconstruction(generator)
        value = self.loop.descend(loss, options.learning_rate(step), clip=5.0)
        update_ema(self.ema, self.decoder, EMA, step + 1)
        return value

    def _distances(self, name: str, paintings: _Paintings, rows: torch.Tensor, remember: bool) -> Distances:
        """The losses of the paintings at these rows."""
        base = self.base
        unscaled = paintings.latents[rows].to(base.device) / base.config.latent_scale
        with autocast(base.device, self.options.mixed_precision):
            decoded = base.decode(unscaled.contiguous(memory_format=torch.channels_last))
            return self.losses[name].forward(decoded, to_images(paintings.pictures[rows], base.device), remember)

    def _reconstruction(self, generator: torch.Generator) -> torch.Tensor:
        """What crops of works and of contents lose by encoding and decoding, as in the autoencoder's training."""
        names, crops = list(self.styles), []
        for index in range(REAL_CROPS):
            style = names[int(torch.randint(len(names), (), generator=generator))]
            pictures = self.contents.training if index % 3 == 0 else self.styles[style].works.training
            picture = pictures[int(torch.randint(len(pictures), (), generator=generator))]
            crops.append(random_crop(picture, min(REAL_SIDE, self.options.size), generator))
        images = to_images(torch.from_numpy(np.stack(crops)), self.base.device)
        with autocast(self.base.device, self.options.mixed_precision):
            with torch.no_grad():
                latents = self.base.autoencoder.encode(images)
            decoded = self.base.autoencoder.decode(latents).float()
            losses = {
                "quarter": F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(images, 4)),
                "full": F.l1_loss(decoded, images),
                "texture": texture_loss(decoded, images),
                "perceptual": self.lite(decoded, images),
            }
        return torch.stack([LOSS_WEIGHTS[key] * loss for key, loss in losses.items()]).sum()

    @torch.no_grad()
    def _evaluate(self, mean_loss: float | None) -> None:
        """The losses of each style's held-out paintings, by the running mean of the weights."""
        self.base.autoencoder.decoder = self.ema
        found: dict[str, Any] = {}
        for name, paintings in self.paintings.items():
            losses = self._distances(name, paintings["held_out"], torch.arange(HELD_OUT), remember=False)
            found[name] = {key: part.item() for key, part in vars(losses).items()}
        self.base.autoencoder.decoder = self.decoder
        self.loop.history.append({"step": self.loop.step, "training": mean_loss, "held_out": found})
        means = [float(np.mean([row[key] for row in found.values()])) for key in ("style", "content")]
        log.info("step %d: held-out style %.4f, content %.4f, mean over the styles", self.loop.step, *means)

    def _identity(self) -> dict[str, Any]:
        return {
            **self.options.identity(),
            "base": self.base.fingerprint,
            "contents": self.contents.digest,
            "styles": list(self.styles),
            **{f"works of {name}": style.works.digest for name, style in self.styles.items()},
            **{f"prompts of {name}": _mean_square(style.prompts) for name, style in self.styles.items()},
        }


def _mean_square(prompts: Prompts) -> str:
    return f"{prompts.prompts.double().square().mean().item():.12g}"
