"""Prompt inversion: learn an artist's prompts against a frozen base (docs/method.md §3).

::

    repeat:
        z0 ~ autoencoder's posterior of a crop of a painting
        t ~ uniform over all timesteps;  ε ~ N(0, 1)
        zt = √ᾱ_t z0 + √(1-ᾱ_t) ε
        C = the prompts of t's stage, a context for each layer group
        loss = w(t) mean((ε_θ(zt, t, C) - ε)²)        the U-Net ε_θ is frozen; w: option `weighting`
        move the prompts down the gradient of the loss (AdamW)

The held-out loss is measured on the way, and the prompts of the best evaluation are the result.
"""

import copy
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from lsast_engines.bundle.style import encode_defaults
from lsast_engines.errors import UsageError, enough_memory

from .base.base import Base
from .evaluation import ValidationSet, noise_error
from .options import TrainOptions
from .paintings import CachedLatents, PaintingDataset, latent_statistics
from .prompts.prompt_file import Prompts, save_prompts
from .prompts.prompt_space import PromptSpace, build_space
from .training.loop import TrainingLoop, require_finite, set_learning_rate
from .training.rng import RngStream, rng_for
from .training.run import LossCurve, RunFiles, RunResult, find_device, fused, versions

log = logging.getLogger("lsast.train")

LOSS_SCALE = 1024.0
"""Factor of the loss in the backward pass with fp16: smaller gradients than 2⁻²⁴ are zero in that type. It is constant,
as the networks are frozen."""

_SAVES_MEMORY = "--gradient-checkpointing, --mixed-precision bf16, or a smaller --batch with --gradient-accumulation"

V_WEIGHT_LIMIT = 20.0
"""Largest weight of a timestep with weighting ``v``; 1/ᾱ would reach 200 at the noisy end."""


class Inversion:
    """One run. Under ``accelerate launch`` every process makes one; gradients are averaged, the first process writes.

    Args:
        base: moved to the device, without its ControlNet; its weights are never changed.
        paintings: the artist's, loaded with the options' size and crop.
        name, folder: of the style, and of the files of the run.
        licence: of the paintings; kept in the prompt file.
        resume: go on from the checkpoint that a stopped run left in `folder`.
        device: in torch's words; None is what accelerate chooses.

    Raises:
        UsageError: as `RunFiles.require`; a device that is not there; prompts that the base has no text encoder for.
        TrainingError: a checkpoint that is missing, in the way, damaged, or of another run.
    """

    def __init__(
        self,
        base: Base,
        paintings: PaintingDataset,
        options: TrainOptions,
        name: str,
        folder: Path,
        licence: str = "",
        resume: bool = False,
        device: str | None = None,
    ) -> None:
        self.files = RunFiles(folder, name)
        self.files.require(options.size, base.config.multiple, resume)
        self.base, self.paintings, self.options, self.licence = base, paintings, options, licence
        self.accelerator = Accelerator()
        chosen = device not in (None, "auto")
        if chosen and self.accelerator.num_processes > 1:
            count = self.accelerator.num_processes
            raise UsageError(f"found --device {device} in one of {count} processes; expected none there")
        base.to(
            find_device(device) if chosen else self.accelerator.device, options.gradient_checkpointing, controlnet=False
        )
        self.latents = self._encode()
        self.space = self._prompt_space()
        self.optimizer = make_optimizer(self.space, options)
        self.held_out, self.training = (self._validation(part) for part in (paintings.held_out, paintings.training))
        self.best = copy.deepcopy(self.space)
        self.loop = TrainingLoop(
            *(name, options, self.files.checkpoint, {"space": self.space, "best": self.best}, self.optimizer),
            identity={
                **options.identity(),
                "base": base.fingerprint,
                "paintings": paintings.digest,
                "processes": self.accelerator.num_processes,
            },
            resume=resume,
            writes=self.accelerator.is_main_process,
            device=base.device,
        )
        self.curve = LossCurve(self.loop.history)

    def run(self) -> RunResult:
        """Train to the last step and write the best prompts; every process returns the result.

        Errors are those of `TrainingLoop.run` and `finishing`, and an `OutOfMemoryError` without memory for a step.
        """
        self._estimate_time()
        if not self.loop.history:
            self._evaluate(None)
        self.loop.run(self._train_step, self._evaluate, self._any_signal)
        with self.loop.finishing(self.files.result):
            return self._finish()

    def loss(self, step: int, process: int, part: int = 0) -> torch.Tensor:
        """The training loss of `step` (from 0) in `process`: weighted noise error of the random batch number `part`."""
        options, base = self.options, self.base
        numbers = (process, step, part) if part else (process, step)
        generator = rng_for(options.seed, RngStream.STEP, *numbers)
        latents = self.latents.sample(options.batch, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        timestep = torch.randint(base.config.noise.train_steps, (options.batch,), generator=generator)
        timestep = timestep.to(latents.device)
        dropout = rng_for(options.seed, RngStream.DROPOUT, *numbers)
        error = noise_error(base, self.space, latents, noise, timestep, options.mixed_precision, dropout)
        if options.weighting == "v":
            error = error * (1 / base.alphas_cumprod[timestep]).clamp(max=V_WEIGHT_LIMIT)
        return error.mean()

    def _estimate_time(self) -> None:
        """Estimate time and memory by two gradients, which are not used; the first one warms a GPU up.

        A forward pass takes about half as long as the gradient of its loss.
        """
        with enough_memory("for a training step", _SAVES_MEMORY):
            for _ in range(2):
                began = time.monotonic()
                self._gradient(self.loop.step)
        seconds, options = time.monotonic() - began, self.options
        rows = 2 * self.space.stages * options.evaluate_latents / self.accelerator.num_processes
        self.loop.tell(seconds, seconds / 2 * rows / (options.batch * options.gradient_accumulation))

    def _train_step(self, step: int) -> float:
        set_learning_rate(self.optimizer, self.options.learning_rate(step))
        mean = self._gradient(step)
        self.optimizer.step()
        return mean

    def _gradient(self, step: int) -> float:
        """Set the gradients of `step`, averaged over the processes; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.options.gradient_accumulation
        scale = LOSS_SCALE if self.options.mixed_precision == "fp16" else 1.0
        total = torch.zeros((), device=self.base.device)
        for part in range(parts):
            loss = self.loss(step, self.accelerator.process_index, part) / parts
            (scale * loss).backward()
            total += loss.detach()
        for parameter in self.space.parameters():
            if parameter.grad is not None and scale != 1:
                parameter.grad /= scale
                total += 0 * parameter.grad.sum()  # a gradient that is not finite makes the loss so
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        mean = float(self.accelerator.reduce(total, "mean"))
        require_finite(mean, step)
        return mean

    def _any_signal(self, number: int) -> int:
        """The signal of any process, so that all of them stop after the same step."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _evaluate(self, mean_loss: float | None) -> None:
        """Measure all stages, shared out among the processes, and keep the prompts if they are the best so far."""
        state = self.accelerator
        mine = range(state.process_index, self.space.stages, state.num_processes)
        losses = torch.stack([part.losses(self.space, mine) for part in (self.held_out, self.training)])
        if state.num_processes > 1:
            losses = state.reduce(losses.float().to(state.device), "sum").cpu().double()
        held_out, training = losses.tolist()
        row = self.loop.record(held_out, training, mean_loss)
        if self.curve.best() is row:
            self.best.load_state_dict(self.space.state_dict())
        if self.loop.step and state.is_main_process:
            log.info(
                "step %d: held-out loss: %.4f x that of the initial prompts, training: %.4f x",
                *(self.loop.step, self.curve.relative(row), self.curve.relative(row, "training")),
            )
            self.curve.save(self.files.curve, {"name": self.files.name, "options": asdict(self.options)})

    def _finish(self) -> RunResult:
        best, relative = self.curve.best()["step"], self.curve.relative(self.curve.best())
        result = RunResult(self.files.result, self.files.curve, self.loop.step, best, relative, self.loop.seconds)
        if self.accelerator.is_main_process:
            prompts = Prompts.of(self.best, self.files.name, self.base.fingerprint, self._meta(result))
            save_prompts(prompts, self.files.result)
            if best == 0:
                log.warning("no step lowered the held-out loss; the initial prompts are kept: change --lr or --steps")
            log.info("kept step %d: held-out loss: %.4f x that of the initial prompts", best, relative)
        self.accelerator.wait_for_everyone()
        return result

    def _encode(self) -> CachedLatents:
        """Crops of the training paintings: no more than half of what the steps draw."""
        options, paintings = self.options, self.paintings.training
        drawn = options.steps * options.batch
        count = len(paintings) * min(options.views, max(1, drawn // (2 * len(paintings))))
        generator, progress = rng_for(options.seed, RngStream.TRAINING_CROPS), self.accelerator.is_main_process
        return CachedLatents.encode(self.base, paintings, options.size, count, generator, progress=progress)

    def _prompt_space(self) -> PromptSpace:
        generator = rng_for(self.options.seed, RngStream.INITIAL_CONTEXT)
        space = build_space(self.base, self.options, lambda: self.latents.sample(32, generator))
        # Processes on unlike hardware would start from slightly unlike style tokens.
        for tensor in (*space.parameters(), *space.buffers()):
            tensor.data = broadcast(tensor.data)
        return space

    def _validation(self, paintings: tuple[Any, ...]) -> ValidationSet:
        """Fixed crops of some paintings."""
        options, count = self.options, self.options.evaluate_latents
        generator = rng_for(options.seed, RngStream.VALIDATION_CROPS)
        cached = CachedLatents.encode(self.base, paintings, options.size, count, generator, mirrored=False)
        latents = cached.take(torch.arange(count), generator)
        return ValidationSet(self.base, latents, options.seed, options.mixed_precision)

    def _meta(self, result: RunResult) -> dict[str, str]:
        return {
            "licence": self.licence,
            "works": str(len(self.paintings.training) + len(self.paintings.held_out)),
            "works_held_out": str(len(self.paintings.held_out)),
            "paintings_sha256": self.paintings.digest,
            "base_name": self.base.config.name,
            "options": json.dumps(asdict(self.options), sort_keys=True),
            **latent_statistics(self.base, self.paintings.training).to_meta(),
            **encode_defaults({"palette": self.options.palette} if self.options.palette else {}),
            "processes": str(self.accelerator.num_processes),
            "steps": str(result.steps),
            "best_step": str(result.best_step),
            "relative_held_out_loss": f"{result.relative_loss:.6f}",
            "versions": json.dumps(versions()),
        }


def make_optimizer(space: PromptSpace, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over everything that `space` learns; a group's learning rate is ``relative`` times the options'."""
    weights = space.attention_weights()
    others = [parameter for name, parameter in space.named_parameters() if name not in weights]
    groups: list[dict[str, Any]] = [{"params": others, "relative": 1.0}]
    if weights:
        groups.append({"params": list(weights.values()), "relative": options.map_lr})
    one_kernel = fused(space.table.device)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.999), weight_decay=options.weight_decay, **one_kernel)
