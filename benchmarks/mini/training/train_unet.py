"""Training of mini's U-Net, ControlNet and style encoder, jointly and from nothing.

v-prediction instead of noise prediction: palette and stroke are decided at high noise, where a noise-weighted loss
hardly counts an error of the picture; there the tokens must lower the loss (docs/mini.md). The exported graph still
gives noise.
"""

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from lsast_train.base.attention import layer_contexts
from lsast_train.base.base import Base, autocast
from lsast_train.training.loop import TrainingLoop
from lsast_train.training.rng import RngStream, rng_for
from lsast_train.training.run import fused

from .dataset import LatentDataset, Window
from .ema import update_ema

log = logging.getLogger("lsast.train.mini")

MIXED_LABELS = frozenset({"various-masters", "various-styles"})
"""Folders of several artists: they train the style encoder, but have no learned tokens of their own."""


@dataclass(frozen=True)
class BaseTrainingOptions:
    """Options of the training of U-Net, ControlNet and style encoder."""

    steps: Annotated[int, "Steps of U-Net and ControlNet."] = 6000
    """Optimiser steps in all; the last fifth decays the learning rate to zero."""
    batch: Annotated[int, "Windows in a step of the U-Net."] = 16
    side: Annotated[int, "Training window in latents."] = 32
    lr: Annotated[float, "Learning rate of the U-Net."] = 4e-4
    style_lr: float = 1.2e-3
    """Learning rate of tokens, style encoder and K/V projections, which otherwise start to learn late."""
    warmup: int = 100
    ema: float = 0.999
    null_share: float = 0.12
    """Part of a batch conditioned on the null context (classifier-free guidance)."""
    label_share: float = 0.45
    """Part of a batch conditioned on the learned tokens of its folder."""
    edge_share: float = 0.75
    """Part of a batch that sees edges; the rest needs the tokens more, and inversion runs without edges."""
    share: dict[str, float] = field(default_factory=dict)
    """Sampling weight of a folder's pictures, default 1."""
    seed: int = 0
    evaluate_every: int = 600
    checkpoint_minutes: float = 5.0
    seconds: float | None = None
    """Wall time that the training may take; its last fifth decays the learning rate, too."""


class LabelTokens(nn.Module):
    """Learned tokens of each labelled folder: class conditioning, with which cross-attention learns early."""

    def __init__(self, labels: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(labels, tokens, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels [B] → tokens [B, tokens, dim]."""
        out: torch.Tensor = self.norm(self.table[labels])
        return out


class JointModel(nn.Module):
    """All networks and tokens that are trained, and the loss of a batch."""

    def __init__(self, base: Base, labels: int) -> None:
        super().__init__()
        if base.style_encoder is None:
            raise ValueError("a base without a style encoder cannot be trained from nothing")
        self.base = base
        self.unet, self.controlnet, self.style_encoder = base.unet, base.controlnet, base.style_encoder
        self.null_context = nn.Parameter(base.null_context.clone())
        self.labels = LabelTokens(labels, *base.null_context.shape)

    def style_parameters(self) -> list[nn.Parameter]:
        """The parameters of the style: tokens, style encoder, and the projections to keys and values."""
        projections = [
            p
            for net in (self.unet, self.controlnet)
            for n, p in net.named_parameters()
            if ".to_k." in n or ".to_v." in n
        ]
        return [self.null_context, *self.style_encoder.parameters(), *self.labels.parameters(), *projections]

    def v_error(
        self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, context: torch.Tensor, edges: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error of v for each row [B]; `edges` [K, 3, 8n, 8n] belong to the first K ≤ B rows."""
        noisy = self.base.add_noise(latents, noise, t)
        contexts = context[:, None].expand(-1, 3, -1, -1)
        residuals: dict[str, Any] = {}
        if seen := len(edges):
            found = self.base.control(noisy[:seen], t[:seen], contexts[:seen], edges)
            rest = [*found["down_block_additional_residuals"], found["mid_block_additional_residual"]]
            *down, mid = (torch.cat([r, r.new_zeros(len(latents) - seen, *r.shape[1:])]) for r in rest)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        kwargs = layer_contexts(contexts)
        output = self.unet(noisy, t, None, cross_attention_kwargs=kwargs, **residuals, return_dict=False)[0]
        abar = self.base.alphas_cumprod[t].view(-1, 1, 1, 1)
        target = abar.sqrt() * noise - (1 - abar).sqrt() * latents
        error: torch.Tensor = (output.float() - target).square().mean((1, 2, 3))
        return error

    def draw_context(
        self, window: Window, options: BaseTrainingOptions, mixed: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Tokens [B, tokens, dim] for a batch: null, learned for the folder, or encoded from another crop."""
        draw = torch.rand(len(window.labels), generator=generator).to(window.labels.device)
        use_null = draw < options.null_share
        use_label = (draw >= 1 - options.label_share) & ~mixed[window.labels]
        tokens = self.style_encoder(window.other)
        tokens = torch.where(use_label[:, None, None], self.labels(window.labels), tokens)
        return torch.where(use_null[:, None, None], self.null_context, tokens)


def learning_rate_factor(step: int, options: BaseTrainingOptions, time_left: float = 1.0) -> float:
    """Warm-up, constant, then linear decay to zero over the last fifth of the steps, or of the time (1 to 0)."""
    start = options.steps * 4 // 5
    decay = 1.0 if step < start else max(0.0, (options.steps - step) / (options.steps - start))
    return min(1.0, (step + 1) / options.warmup) * min(decay, 5 * time_left)


@torch.no_grad()
def token_gain(model: JointModel, data: LatentDataset, side: int, count: int = 32) -> list[dict[str, float]]:
    """v-errors of held-out pictures with null, own, another's and label tokens, in every second stage.

    The *token gain* is null minus own (docs/mini.md); without it there is nothing for a prompt space to learn.
    """
    rng, device = np.random.default_rng(1234), model.null_context.device
    window = data.window(rng.choice(data.held_out, count, replace=len(data.held_out) < count), side, rng)
    noise = torch.from_numpy(rng.standard_normal(window.latents.shape).astype(np.float32)).to(device)
    own = model.style_encoder(window.other)
    contexts = {
        "null": model.null_context.expand(count, -1, -1),
        "own": own,
        "other": own.roll(count // 2, 0),
        "label": model.labels(window.labels),
    }
    rows = []
    for stage in range(1, 10, 2):
        t = torch.full((count,), stage * 100 + 50, device=device)
        row: dict[str, float] = {"t": float(stage * 100 + 50)}
        for name, context in contexts.items():
            with autocast(device, "auto"):
                row[name] = model.v_error(window.latents, noise, t, context, window.edges[:0]).mean().item()
        with autocast(device, "auto"):
            row["own+edges"] = model.v_error(window.latents, noise, t, own, window.edges).mean().item()
        rows.append(row)
    return rows


def train_base(base: Base, data: LatentDataset, options: BaseTrainingOptions, folder: Path, resume: bool) -> JointModel:
    """Train `base` in place; checkpoint and log go to `folder`. The result carries the averaged weights.

    It trains where `data` lies; `base` comes back on the CPU. Random numbers are drawn on the CPU, so a seed means the
    same on every device. Errors are those of `TrainingLoop` and its `run`.
    """
    device = data.device
    base.to(device)
    model = JointModel(base, len(data.label_names)).requires_grad_(True)
    base.autoencoder.requires_grad_(False)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    style = set(model.style_parameters())
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p not in style], "relative": 1.0},
        {"params": [p for p in model.parameters() if p in style], "relative": options.style_lr / options.lr},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01, **fused(device))
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    loop = TrainingLoop(
        *("mini base", options, folder / "base.checkpoint.safetensors"),
        *({"model": model, "ema": averaged}, optimizer),
        resume=resume,
        device=device,
    )
    mixed = torch.tensor([name in MIXED_LABELS for name in data.label_names], device=device)
    weights = data.sampling_weights(options.share)
    with_edges = round(options.edge_share * options.batch)

    def train_step(step: int) -> float:
        rng, generator = np.random.default_rng([options.seed, step]), rng_for(options.seed, RngStream.STEP, step)
        window = data.window(rng.choice(data.train, options.batch, p=weights), options.side, rng)
        latents = window.latents.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        t = torch.randint(base.config.noise.train_steps, (options.batch,), generator=generator).to(device)
        with autocast(device, "auto"):
            context = model.draw_context(window, options, mixed, generator)
            loss = model.v_error(latents, noise, t, context, window.edges[:with_edges]).mean()
        value = loop.descend(loss, options.lr * learning_rate_factor(step, options, loop.time_left), clip=1.0)
        update_ema(averaged, model, options.ema, step + 1)
        return value

    def evaluate(mean_loss: float) -> None:
        gain = token_gain(averaged, data, options.side)
        pictures = loop.step * options.batch
        loop.history.append({"step": loop.step, "pictures": pictures, "loss": mean_loss, "gain": gain})
        loop.write_log(folder / "base.log.json")

    loop.run(train_step, evaluate)
    loop.save()
    model.load_state_dict(averaged.state_dict())
    model.to("cpu")
    base.null_context = model.null_context.detach().clone()
    base.to(torch.device("cpu"))
    return model
