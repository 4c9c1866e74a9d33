"""Second phase of mini's autoencoder: encoder and decoder together, against a discriminator.

An absolute error leaves a small autoencoder soft: what it cannot place exactly it averages, and with it goes the
texture that tells one painter from another. Here exact pixels count at a quarter of the size and only weakly at full
size; there the features of a classifier and a discriminator ask for plausible texture, and the discriminator's own
features keep it in its place. The decoder gets latents corrupted as a sampler's are: smoothed and noisy.

With a teacher (TAESD) the encoder only imitates the teacher's latents, which carry finer texture than a small encoder
finds by itself, and most of each batch is decoded from these, towards what the teacher decodes: that is a function of
the latents, so there is nothing to average. Without a teacher encoder and decoder learn together, and the latents stay
near those of the start.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from lsast_engines.errors import TrainingError, fault_list
from lsast_engines.files import replace_file

from ..base.mini_autoencoder import MiniAutoencoder
from ..training.checkpoint import load_checkpoint, save_checkpoint
from ..training.signals import DeferredSignals, InterruptionError
from .discriminator import MultiscaleDiscriminator, d_loss, feature_matching, g_loss
from .perceptual import PerceptualDistance
from .train_autoencoder import Crops, psnr

log = logging.getLogger("lsast.train.mini")

BLOCK = 16
"""Side in pixels of the blocks that `gradient_kept` sorts into quarters."""


@dataclass(frozen=True)
class GanOptions:
    """Every knob of the second phase."""

    steps: int = 40000
    """Optimiser steps in all; the last third decays the learning rates to zero."""
    encoder_lr: float = 1e-3
    """Learning rate of the encoder."""
    encoder_part: float = 0.6
    """Part of the steps in which the encoder learns too. Then the latent space stands."""
    batch: int = 8
    lr: float = 4e-4
    """Learning rate of decoder and discriminator."""
    lr_warmup: int = 100
    """Steps of linear rise, from the start and after a resume without optimiser state."""
    gan_warmup: int = 300
    """Steps in which the discriminator learns before it is used for the autoencoder."""
    quarter: float = 1.0
    """Weight of the absolute error at a quarter of the size."""
    full: float = 0.3
    """Weight of the absolute error at full size."""
    texture: float = 0.3
    """Weight of `texture_loss`."""
    perceptual: float = 0.5
    """Weight of the distance of the features of EfficientNet-Lite1."""
    adversarial: float = 0.1
    """Weight of `g_loss`."""
    matching: float = 1.0
    """Weight of `feature_matching`."""
    anchor: float = 1.0
    """Weight of the squared and of the absolute distance to the anchor's latents: scale and meaning of the channels
    stay. With 0.05 the encoder answers `noise` by larger latents."""
    taught: float = 0.75
    """With a teacher: part of the batch decoded from the teacher's latents, towards what the teacher decodes."""
    smoothing: float = 0.5
    """Latents are blended with their 3x3 mean by a random part up to this."""
    noise: float = 0.25
    """Latents get noise of a random standard deviation up to this."""
    ema: float = 0.9995
    """Decay of the running mean of the autoencoder's weights, which is the result."""
    seed: int = 0
    checkpoint_seconds: float = 300.0


def corrupt_latents(latents: torch.Tensor, options: GanOptions, generator: torch.Generator) -> torch.Tensor:
    """Latents [B, 4, h, w] as a sampler might give them: each row smoothed and noisy by its own random amount.

    Random numbers are drawn on the CPU, so a seed means the same on every device.
    """
    rows = (len(latents), 1, 1, 1)
    part = options.smoothing * torch.rand(rows, generator=generator)
    noise = options.noise * torch.rand(rows, generator=generator) * torch.randn(latents.shape, generator=generator)
    smooth = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return latents + part.to(latents.device) * (smooth - latents) + noise.to(latents.device)


def update_ema(ema: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Move every weight of `ema` towards `module`'s by 1 - min(decay, (1 + step) / (10 + step)).

    The shorter memory of the first steps is that of TensorFlow's ExponentialMovingAverage with ``num_updates``.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), share)


def texture_loss(decoded: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """How far the mean gradients of windows of 8x8 pixels are from those of `image`, [B, C, H, W] both.

    Mean of |log((a + c) / (b + c))|, by direction and channel, with c = 0.01. It asks for as much texture, flat areas
    counting as much as busy ones, and leaves its exact place to the other losses: the absolute error of gradients is
    least where uncertain texture is left out.
    """
    logs = [
        torch.log(F.avg_pool2d(x.diff(dim=dim).abs(), 8, ceil_mode=True) + 0.01)
        for x in (decoded, image)
        for dim in (2, 3)
    ]
    return ((logs[0] - logs[2]).abs().mean() + (logs[1] - logs[3]).abs().mean()) / 2


def gradient_magnitude(image: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W] → [B, 1, H-1, W-1]: mean over channels of |∂y| + |∂x|."""
    return (image[..., 1:, :-1] - image[..., :-1, :-1]).abs().mean(1, keepdim=True) + (
        image[..., :-1, 1:] - image[..., :-1, :-1]
    ).abs().mean(1, keepdim=True)


def gradient_kept(decoded: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """How much of the gradient of `image` [1, C, H, W] is in `decoded`, by quarters of its blocks: [4], 1 = all.

    The blocks of 16x16 pixels are sorted by their gradient in `image`, flattest quarter first.
    """
    wanted = F.avg_pool2d(gradient_magnitude(image), BLOCK).flatten()
    found = F.avg_pool2d(gradient_magnitude(decoded), BLOCK).flatten()
    quarters = wanted.argsort().tensor_split(4)
    return torch.stack([found[index].sum() / wanted[index].sum().clamp(min=1e-6) for index in quarters])


@torch.no_grad()
def evaluate(
    autoencoder: MiniAutoencoder, anchor: nn.Module, pictures: list[torch.Tensor], perceptual: PerceptualDistance
) -> dict[str, float]:
    """Means over whole pictures [1, 3, H, W] in [-1, 1]: PSNR, feature distance and gradient kept in the flattest and
    the busiest quarter, of the autoencoder and (``anchor_…``) of its decoder on the anchor's latents; the distance
    between the two latents, and the spread of the autoencoder's."""
    rows = []
    for image in pictures:
        latents, anchored = autoencoder.encode(image), anchor(image)
        row = {"latent_shift": (latents - anchored).square().mean().sqrt().item(), "latent_std": latents.std().item()}
        for name, given in {"": latents, "anchor_": anchored}.items():
            decoded = autoencoder.decode(given).clamp(-1, 1)
            kept = gradient_kept(decoded, image)
            row |= {
                f"{name}psnr": psnr(decoded, image),
                f"{name}feature_distance": perceptual(decoded, image).item(),
                f"{name}gradient_kept_flattest": kept[0].item(),
                f"{name}gradient_kept_busiest": kept[3].item(),
            }
        rows.append(row)
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def save_gan_weights(file: Path, networks: dict[str, nn.Module], step: int) -> None:
    """Write `networks` in fp16 into one safetensors file, `step` in its metadata: small enough to be handed on."""
    tensors = {
        f"{name}.{key}": value.detach().cpu().half().contiguous()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
    with replace_file(file) as handle:
        handle.write(save(tensors, {"step": str(step)}))


def load_gan_weights(file: Path, networks: dict[str, nn.Module]) -> int:
    """Load what `save_gan_weights` wrote into `networks`, a subset of those that were written; returns the step.

    Raises:
        TrainingError: damaged, or of other networks (all faults at once).
    """
    try:
        with safe_open(str(file), "pt") as opened:
            step = int((opened.metadata() or {})["step"])
            tensors = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{file} holds no weights of mini's autoencoder ({error})") from error
    faults = []
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            found = tensors.get(f"{name}.{key}")
            if found is None or found.shape != value.shape:
                shape = "nothing" if found is None else tuple(found.shape)
                faults.append(f"{name}.{key}: found {shape}, expected {tuple(value.shape)}")
    if faults:
        raise TrainingError(fault_list(f"{file} does not fit (a file trained with a teacher holds no anchor):", faults))
    for name, network in networks.items():
        network.load_state_dict({key: tensors[f"{name}.{key}"] for key in network.state_dict()})
    return step


class TrainingState:
    """What a run holds: networks, optimiser and counters."""

    def __init__(
        self,
        autoencoder: MiniAutoencoder,
        options: GanOptions,
        device: torch.device,
        teacher: AutoencoderTiny | None = None,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            discriminator = MultiscaleDiscriminator()
        self.options, self.device = options, device
        self.autoencoder = autoencoder
        self.ema = copy.deepcopy(autoencoder)
        self.teacher = teacher
        self.anchor: nn.Module = copy.deepcopy(autoencoder.encoder) if teacher is None else teacher.encoder
        self.discriminator = discriminator
        frozen = [self.ema, self.anchor, *([] if teacher is None else [teacher])]
        for module in (self.autoencoder, self.discriminator, *frozen):
            module.to(device, memory_format=torch.channels_last)
        for module in frozen:
            module.eval().requires_grad_(False)
        self.autoencoder.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(autoencoder.encoder.parameters()), "base": options.encoder_lr},
                {"params": [*autoencoder.decoder.parameters(), *self.discriminator.parameters()], "base": options.lr},
            ],
            lr=options.lr,
            betas=(0.5, 0.99),
            weight_decay=0.0,
            fused=True,
        )
        self.step = 0
        self.started = 0
        """Step of the last start without optimiser state."""
        self.history: list[dict[str, float]] = []

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks of a checkpoint."""
        return {**self.exported, "autoencoder": self.autoencoder, "ema": self.ema}

    @property
    def exported(self) -> dict[str, nn.Module]:
        """The networks of the weights file. The teacher is in none of the files."""
        own = {} if self.teacher is not None else {"anchor": self.anchor}
        return {"autoencoder": self.ema, "discriminator": self.discriminator, **own}

    def save(self, folder: Path) -> None:
        """Write checkpoint, log and weights file into `folder`."""
        facts = {"step": self.step, "started": self.started, "history": self.history}
        save_checkpoint(folder / "finetune_gan.checkpoint.safetensors", self.modules, self.optimizer, facts)
        with replace_file(folder / "finetune_gan.log.json") as handle:
            handle.write(json.dumps({"options": asdict(self.options), "history": self.history}, indent=1).encode())
        save_gan_weights(folder / "finetune_gan.safetensors", self.exported, self.step)

    def load(self, checkpoint: Path) -> None:
        """Go on exactly from a checkpoint."""
        facts = load_checkpoint(checkpoint, self.modules, self.optimizer)
        self.step, self.started, self.history = facts["step"], facts["started"], facts["history"]
        # The fused optimiser reads memory as it lies: its state must lie as the weights do, channels last.
        for parameter, entry in self.optimizer.state.items():
            for name, value in entry.items():
                if value.shape == parameter.shape:
                    entry[name] = torch.empty_like(parameter).copy_(value)

    def load_weights(self, file: Path) -> None:
        """Go on from a weights file, at its step; the optimiser starts anew."""
        self.step = self.started = load_gan_weights(file, self.exported)
        self.autoencoder.load_state_dict(self.ema.state_dict())

    def train_step(self, images: torch.Tensor, perceptual: PerceptualDistance) -> dict[str, torch.Tensor]:
        """One step of both optimisers on images [B, 3, side, side]; returns the parts of the losses."""
        options, decoder = self.options, list(self.autoencoder.decoder.parameters())
        use_gan = self.step >= self.started + options.gan_warmup
        train_encoder = self.step < options.encoder_part * options.steps
        rise = min(1.0, (self.step - self.started + 1) / options.lr_warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rise * min(1.0, 3 * (options.steps - self.step) / options.steps)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.set_grad_enabled(train_encoder):
                latents = self.autoencoder.encode(images).float()
            with torch.no_grad():
                anchor = self.anchor(images).float() if train_encoder or self.teacher is not None else latents
            given, target = self.batch(latents, anchor, images)
            decoded = self.autoencoder.decode(corrupt_latents(given, options, generator)).float()
            losses = {
                "quarter": F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(images, 4)),
                "full": F.l1_loss(decoded, target),
                "texture": texture_loss(decoded, target),
                "anchor": F.mse_loss(latents, anchor) + F.l1_loss(latents, anchor),
                "perceptual": perceptual(decoded, target),
            }
            real, fake = self.discriminator(target), self.discriminator(decoded.detach())
            real, fake = ([[x.float() for x in scale] for scale in scales] for scales in (real, fake))
            if use_gan:
                self.discriminator.requires_grad_(False)
                scores = [[x.float() for x in scale] for scale in self.discriminator(decoded)]
                self.discriminator.requires_grad_(True)
                losses |= {"matching": feature_matching(real, scores), "adversarial": g_loss(scores)}
        generator_loss = torch.stack([getattr(options, name) * loss for name, loss in losses.items()]).sum()
        discriminator_loss = d_loss(real, fake)
        self.optimizer.zero_grad(set_to_none=True)
        generator_loss.backward(inputs=list(self.autoencoder.parameters()) if train_encoder else decoder)
        discriminator_loss.backward()
        nn.utils.clip_grad_norm_(self.autoencoder.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        update_ema(self.ema, self.autoencoder, options.ema, self.step - self.started)
        return {**losses, "discriminator": discriminator_loss}

    def batch(
        self, latents: torch.Tensor, anchor: torch.Tensor, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents to decode and images to come near. With a teacher the first rows are the teacher's, and no gradient
        goes to the encoder."""
        if self.teacher is None:
            return latents, images
        count = round(self.options.taught * len(images))
        with torch.no_grad():
            target = torch.cat([self.teacher.decoder(anchor[:count]).float().clamp(-1, 1), images[count:]])
            given = torch.cat([anchor[:count], latents[count:]])
        return given, target.contiguous(memory_format=torch.channels_last)


def train_vae_gan(
    autoencoder: MiniAutoencoder,
    crops: Crops,
    options: GanOptions,
    folder: Path,
    perceptual: PerceptualDistance,
    *,
    resume: bool = False,
    weights: Path | None = None,
    teacher: AutoencoderTiny | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Train `autoencoder` in place; it ends with the running mean of its weights, frozen, on the CPU.

    Args:
        autoencoder: weights to start from.
        crops: the pictures.
        options: the knobs.
        folder: gets ``finetune_gan.checkpoint.safetensors``, ``finetune_gan.log.json`` and the fp16 weights
            ``finetune_gan.safetensors`` every `GanOptions.checkpoint_seconds`.
        perceptual: weighs `GanOptions.perceptual`; `LiteDistance` on `device`.
        resume: go on from the checkpoint in `folder`, if one is there.
        weights: without a checkpoint, go on from this file of `save_gan_weights`: at its step, with a new optimiser.
        teacher: its encoder anchors the latents; None: that of `autoencoder` at the start.
        device: where to train. Random numbers are drawn on the CPU, so a seed means the same on every device.

    Raises:
        InterruptionError: SIGINT or SIGTERM; the checkpoint is written.
        TrainingError: files of other options.
    """
    device = torch.device(device)
    state = TrainingState(autoencoder, options, device, teacher)
    checkpoint = folder / "finetune_gan.checkpoint.safetensors"
    if resume and checkpoint.exists():
        state.load(checkpoint)
    elif weights is not None:
        state.load_weights(weights)
    pictures = [x.to(device, memory_format=torch.channels_last) for x in crops.pictures(24)]
    running: dict[str, float] = {}
    saved = time.monotonic()
    with (
        DeferredSignals() as signals,
        tqdm(total=options.steps, initial=state.step, desc="mini autoencoder, GAN", unit="step") as progress,
    ):
        while state.step < options.steps:
            images = crops.batch(crops.train, options.batch, np.random.default_rng([options.seed, state.step]))
            parts = state.train_step(images.to(device), perceptual)
            share = 1.0 if not running else 0.02
            running = {k: (1 - share) * running.get(k, v.item()) + share * v.item() for k, v in parts.items()}
            progress.set_postfix({k: f"{v:.3f}" for k, v in running.items()}, refresh=False)
            progress.update()
            due = time.monotonic() - saved > options.checkpoint_seconds
            if due or signals.number or state.step == options.steps:
                measured = evaluate(state.ema, state.anchor, pictures, perceptual)
                state.history.append({"step": state.step, **running, **measured})
                log.info("%s", state.history[-1])
                state.save(folder)
                saved = time.monotonic()
            if signals.number and state.step < options.steps:
                raise InterruptionError(signals.number, state.step, checkpoint)
    autoencoder.load_state_dict(state.ema.state_dict())
    autoencoder.to("cpu").eval().requires_grad_(False)
