"""Prompt inversion: learn an artist's prompts against a frozen base.

Each step noises latents of the artist's paintings to random timesteps, lets the frozen U-Net predict the noise under
the contexts of those timesteps' stages, and moves the prompts down the squared error (docs/method.md §3). A held-out
loss
is measured on the way, and the prompts of the best evaluation are the result.

Every random number of a step comes from a generator seeded with (seed, process, step): nothing random has to be
stored, and a resumed run repeats the numbers of an uninterrupted one.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from tqdm import tqdm

from lsast_engines.environment import package_version
from lsast_engines.errors import TrainingError, UsageError, fault_list

from .base.base import Base
from .evaluation import Probe, Purpose, noise_error, seeded
from .options import TrainOptions, style_name_faults
from .paintings import Collection, EncodedViews, FreshViews, LatentSource
from .prompts.prompt_file import Prompts, save_prompts
from .prompts.prompt_space import PromptSpace, build_space
from .training.checkpoint import load_checkpoint, save_checkpoint
from .training.loss_curve import Curve, Evaluation, save_curve
from .training.signals import InterruptionError, NotedSignals

log = logging.getLogger("lsast.train")

V_WEIGHT_LIMIT = 20.0
"""Largest weight of a timestep with weighting ``v``; 1/ᾱ would reach 200 at the noisy end."""


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes, all in one folder and under the style's name."""

    folder: Path
    name: str

    @property
    def prompts(self) -> Path:
        """The result."""
        return self.folder / f"{self.name}.prompts.safetensors"

    @property
    def checkpoint(self) -> Path:
        """There only while a run is unfinished."""
        return self.folder / f"{self.name}.checkpoint.safetensors"

    @property
    def curve(self) -> Path:
        """The losses as JSON; the picture has the suffix ``.png``."""
        return self.folder / f"{self.name}.curve.json"


@dataclass(frozen=True)
class Outcome:
    """What a finished run gives."""

    prompts: Path
    curve: Path
    steps: int
    best_step: int
    """Step of the prompts that were kept."""
    relative: float
    """Their held-out loss as a part of the untrained prompts' (`Curve.relative`)."""
    seconds: float
    """Wall time, including that of the parts before a resume."""


class Inversion:
    """One run. Under ``accelerate launch`` every process makes one; gradients are averaged, the first process writes.

    Args:
        base: moved to the device that accelerate chooses; its weights are never changed.
        collection: the artist's paintings, loaded with the options' size and crop.
        options: every knob.
        name: of the style.
        folder: for the files of the run.
        licence: of the paintings; kept in the prompt file.
        resume: go on from the checkpoint that a stopped run left in `folder`.
        on_step: called with step and loss after each step; for tests and tools.

    Raises:
        UsageError: a name that is no file name, or a size that the base cannot take (all faults at once); prompts of a
            kind that the base has not got.
        TrainingError: a checkpoint that is missing, in the way, damaged, or of another run.
    """

    def __init__(
        self,
        base: Base,
        collection: Collection,
        options: TrainOptions,
        name: str,
        folder: Path,
        licence: str = "",
        resume: bool = False,
        on_step: Callable[[int, float], None] | None = None,
    ) -> None:
        faults = style_name_faults(name)
        if options.size % base.config.multiple:
            faults.append(
                f"size: found {options.size}; expected a multiple of {base.config.multiple} for base {base.config.name}"
            )
        if faults:
            raise UsageError(fault_list("this run cannot be meant:", faults))
        self.base, self.collection, self.options = base, collection, options
        self.files = RunFiles(folder, name)
        self._check_checkpoint(resume)
        self.accelerator = Accelerator()
        self._licence, self._on_step = licence, on_step
        place(base, self.accelerator.device, options.gradient_checkpointing)
        self._source = self._training_source()
        self._probes = self._make_probes()
        self.space = self._make_space()
        self._best = copy.deepcopy(self.space)
        self.optimizer = make_optimizer(self.space, options)
        self.curve = Curve()
        self.step = 0
        self._loss_sum = 0.0
        self._seconds = 0.0
        self._signals = NotedSignals()
        if resume:
            self._restore()

    def run(self) -> Outcome:
        """Train to the last step, evaluate on the way, write the best prompts; every process returns the outcome.

        Raises:
            TrainingError: a loss that is not finite.
            InterruptionError: SIGINT or SIGTERM; a checkpoint was written.
        """
        options, main = self.options, self.accelerator.is_main_process
        if main:
            self.files.folder.mkdir(parents=True, exist_ok=True)
        began = saved = time.monotonic()
        before = self._seconds
        bar = tqdm(total=options.steps, initial=self.step, desc=self.files.name, unit="step", disable=not main)
        with bar, self._signals:
            if not self.curve.evaluations:
                self._evaluate(None)
            while self.step < options.steps:
                loss, stop = self._train_step()
                self._loss_sum += loss
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if self._on_step is not None:
                    self._on_step(self.step, loss)
                if self.step % options.evaluate_every == 0 or self.step == options.steps:
                    self._evaluate(bar)
                self._seconds = before + time.monotonic() - began
                due = time.monotonic() - saved > 60 * options.checkpoint_minutes
                if main and (stop or due):
                    self._save_checkpoint()
                    saved = time.monotonic()
                if stop and self.step < options.steps:
                    raise InterruptionError(stop, self.step, self.files.checkpoint)
        return self._finish()

    def _check_checkpoint(self, resume: bool) -> None:
        checkpoint = self.files.checkpoint
        if resume and not checkpoint.exists():
            raise TrainingError(f"found no checkpoint {checkpoint}; start without --resume")
        if checkpoint.exists() and not resume:
            raise TrainingError(
                f"found the checkpoint of an unfinished run, {checkpoint}; go on with --resume, or delete it"
            )

    def _restore(self) -> None:
        checkpoint = self.files.checkpoint
        facts = load_checkpoint(checkpoint, {"space": self.space, "best": self._best}, self.optimizer)
        own = self._identity()
        known = facts.get("identity", {})
        faults = [
            f"{key}: found {known.get(key)!r} in the checkpoint, {own[key]!r} now"
            for key in own
            if known.get(key) != own[key]
        ]
        if faults:
            raise TrainingError(fault_list(f"{checkpoint} belongs to another run; give the same options:", faults))
        self.step, self._loss_sum, self._seconds = facts["step"], facts["loss_sum"], facts["seconds"]
        self.curve = Curve.from_json(facts["curve"])
        log.info("goes on after step %d of %d", self.step, self.options.steps)

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with its checkpoint, as JSON values."""
        knobs = asdict(self.options)
        del knobs["checkpoint_minutes"], knobs["gradient_checkpointing"]  # they change no result
        return {
            **knobs,
            "base": self.base.fingerprint,
            "paintings": self.collection.digest,
            "processes": self.accelerator.num_processes,
        }

    def _training_source(self) -> LatentSource:
        options, paintings = self.options, self.collection.training
        if options.views == 0:
            return FreshViews(self.base, paintings, options.size)
        # Views that no step would draw are not encoded: a large collection is seen through fewer crops of each.
        drawn = options.steps * options.batch
        crops = min(options.views, max(1, drawn // (2 * len(paintings))))
        generator = seeded(options.seed, Purpose.TRAINING_VIEWS)
        return EncodedViews.of(
            self.base,
            paintings,
            options.size,
            crops * len(paintings),
            generator,
            progress=self.accelerator.is_main_process,
        )

    def _make_probes(self) -> tuple[Probe, Probe]:
        """Fixed views of held-out and of training paintings."""
        probes = []
        count = self.options.evaluate_latents
        for paintings in (self.collection.held_out, self.collection.training):
            generator = seeded(self.options.seed, Purpose.HELD_OUT_VIEWS)
            views = EncodedViews.of(self.base, paintings, self.options.size, count, generator, mirrored=False)
            latents = views.take(torch.arange(count), generator)
            probes.append(Probe(self.base, latents, self.options.seed, self.options.precision))
        return probes[0], probes[1]

    def _make_space(self) -> PromptSpace:
        generator = seeded(self.options.seed, Purpose.INITIAL_CONTEXT)
        space = build_space(self.base, self.options, lambda: self._source.draw(32, generator))
        # Processes on unlike hardware would start from slightly unlike style tokens.
        for tensor in (*space.parameters(), *space.buffers()):
            tensor.data = broadcast(tensor.data)
        return space

    def loss(self, step: int, process: int) -> torch.Tensor:
        """The training loss of `step` (from 0) in `process`: weighted noise error of a random batch."""
        options, base = self.options, self.base
        generator = seeded(options.seed, Purpose.STEP, process, step)
        latents = self._source.draw(options.batch, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        timestep = torch.randint(base.config.noise.train_steps, (options.batch,), generator=generator)
        timestep = timestep.to(latents.device)
        dropout = seeded(options.seed, Purpose.DROPOUT, process, step)
        error = noise_error(base, self.space, latents, noise, timestep, options.precision, dropout)
        if options.weighting == "v":
            error = error * (1 / base.alphas_cumprod[timestep]).clamp(max=V_WEIGHT_LIMIT)
        return error.mean()

    def _train_step(self) -> tuple[float, int]:
        """One step; returns loss and, if one came in, the number of a stop signal, the same in every process."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["relative"] * self.options.learning_rate(self.step)
        loss = self.loss(self.step, self.accelerator.process_index)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        status = torch.tensor([loss.item(), self._signals.number], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            for parameter in self.space.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            mean_loss = self.accelerator.reduce(status[0].float().to(self.accelerator.device), "mean")
            signals = self.accelerator.gather(status[1:].float().to(self.accelerator.device))
            status = torch.stack([mean_loss.double().cpu(), signals.max().double().cpu()])
        if not math.isfinite(status[0].item()):
            raise TrainingError(
                f"the loss of step {self.step} is {status[0].item()}; lower --lr, or use --precision fp32"
            )
        self.optimizer.step()
        self.step += 1
        return status[0].item(), int(status[1].item())

    def _evaluate(self, bar: tqdm[Any] | None) -> None:
        state = self.accelerator
        mine = range(state.process_index, self.space.stages, state.num_processes)
        parts = torch.stack([probe.losses(self.space, mine) for probe in self._probes])
        if state.num_processes > 1:
            parts = state.reduce(parts.float().to(state.device), "sum").double().cpu()
        since = self.step % self.options.evaluate_every or self.options.evaluate_every
        trained = self.step > 0
        evaluation = Evaluation(
            self.step,
            tuple(parts[0].tolist()),
            tuple(parts[1].tolist()),
            self._loss_sum / since if trained else None,
            self.options.learning_rate(self.step - 1) if trained else None,
        )
        self._loss_sum = 0.0
        self.curve.evaluations.append(evaluation)
        if self.curve.best() is evaluation:
            self._best.load_state_dict(self.space.state_dict())
        if bar is None or not state.is_main_process:
            return
        log.info(
            "step %d: held-out loss %.4f of the untrained, training %.4f",
            self.step,
            self.curve.relative(evaluation),
            self.curve.relative_training(evaluation),
        )
        save_curve(self.curve, self.files.curve, {"name": self.files.name, "options": asdict(self.options)})

    def _save_checkpoint(self) -> None:
        facts = {
            "identity": self._identity(),
            "step": self.step,
            "loss_sum": self._loss_sum,
            "seconds": self._seconds,
            "curve": self.curve.to_json(),
        }
        save_checkpoint(self.files.checkpoint, {"space": self.space, "best": self._best}, self.optimizer, facts)

    def _finish(self) -> Outcome:
        best = self.curve.best()
        relative = self.curve.relative(best)
        outcome = Outcome(self.files.prompts, self.files.curve, self.step, best.step, relative, self._seconds)
        if self.accelerator.is_main_process:
            meta = self._meta(outcome)
            prompts = Prompts.of(self._best, self.files.name, self.base.fingerprint, meta)
            save_prompts(prompts, self.files.prompts)
            self.files.checkpoint.unlink(missing_ok=True)
            if best.step == 0:
                log.warning("no step lowered the held-out loss; the prompts kept are untrained: change --lr or --steps")
            log.info("kept step %d: held-out loss %.4f of the untrained", best.step, relative)
        self.accelerator.wait_for_everyone()
        return outcome

    def _meta(self, outcome: Outcome) -> dict[str, str]:
        return {
            "licence": self._licence,
            "works": str(len(self.collection.training) + len(self.collection.held_out)),
            "works_held_out": str(len(self.collection.held_out)),
            "paintings_sha256": self.collection.digest,
            "base_name": self.base.config.name,
            "options": json.dumps(asdict(self.options), sort_keys=True),
            "processes": str(self.accelerator.num_processes),
            "steps": str(outcome.steps),
            "best_step": str(outcome.best_step),
            "relative_held_out_loss": f"{outcome.relative:.6f}",
            "versions": json.dumps(versions()),
        }


def make_optimizer(space: PromptSpace, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over all that `space` learns; the learning rate of a group is ``relative`` times the options'."""
    groups: list[dict[str, Any]] = [{"params": space.learned(), "relative": 1.0}]
    if maps := list(space.maps().values()):
        groups.append({"params": maps, "relative": options.map_lr})
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.999), weight_decay=options.weight_decay)


def place(base: Base, device: torch.device, checkpointing: bool = False) -> None:
    """Move a base to `device`, the U-Net channels-last: convolutions run faster so, on CPUs as on GPUs.

    Args:
        base: the base.
        device: where training runs.
        checkpointing: the U-Net computes its activations again on the way back.
    """
    for network in base.networks().values():
        network.to(device)
    if base.text_encoder is not None:
        base.text_encoder.to(device)
    base.unet.to(memory_format=torch.channels_last)
    (base.unet.enable_gradient_checkpointing if checkpointing else base.unet.disable_gradient_checkpointing)()
    base.null_context = base.null_context.to(device)
    base.alphas_cumprod = base.alphas_cumprod.to(device)


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {name: package_version(name) for name in ("lsast", "torch", "diffusers")}
