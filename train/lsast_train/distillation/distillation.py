"""Distillation: a style trained until one pass of the frozen base gives what guidance gives with two.

Guidance doubles the U-Net's work. A style's keys and values can be trained, so the guided noise of a teacher (the same
base under the original style, `lsast_train.distillation.teacher`) is the target of one pass under the trained style.
Stages are independent: a step uses samples of one stage and changes that stage alone.

The result is an ordinary style with ``guidance_baked`` in its metadata.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from lsast_engines.bundle.style import Style
from lsast_engines.errors import TrainingError

from ..base.base import Base, autocast
from ..base.kv_packing import kv_layouts
from ..options import identity
from ..paintings import PaintingDataset
from ..training.device import find_device, fused
from ..training.loop import TrainingLoop, require_finite, set_learning_rate
from ..training.loss_curve import Curve, Evaluation, save_curve
from ..training.rng import RngStream, rng_for
from ..training.run_files import RunFiles, RunResult, require_run
from .options import DistillOptions
from .source_style import null_rows
from .student import Student, distilled_meta
from .teacher import Samples, Teacher, TeacherSamples, control_residuals, predict, read_content

log = logging.getLogger("lsast.train")

INIT_GUIDANCE_GRID = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
"""Initial values that are tried: this far along the line from the null context's keys and values through the style's.
Were the base linear in them, the guidance itself would be the answer."""

INIT_SAMPLES = 8
"""Samples of a stage by which its initial value is chosen."""

ROWS = 8
"""Rows of one call in an evaluation, at 256 pixels."""


class Distillation:
    """One run.

    Args:
        base: moved to the device; its weights are never changed.
        pictures: of any kind, loaded with the options' size, for the teacher to paint.
        resume: go on from the checkpoint that a stopped run left in `folder`.
        on_step: called with the number of steps done and the loss after each step.
        device: in torch's words; None is what accelerate chooses.

    Raises:
        UsageError: a device that is not there; a name that is no file name, or a size that the base cannot take.
        TrainingError: a checkpoint that is missing, in the way, damaged, or of another run.
    """

    def __init__(
        self,
        base: Base,
        style: Style,
        pictures: PaintingDataset,
        options: DistillOptions,
        name: str,
        folder: Path,
        resume: bool = False,
        on_step: Callable[[int, float], None] | None = None,
        device: str | None = None,
    ) -> None:
        self.files = RunFiles(folder, name, prompts=False)
        require_run(self.files, options.size, base.config.multiple, resume)
        self.base, self.style, self.pictures, self.options, self.on_step = base, style, pictures, options, on_step
        base.to(Accelerator().device if device in (None, "auto") else find_device(device))
        self.student = Student(style, kv_layouts(base)[0]).to(base.device)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=options.lr, betas=(0.9, 0.999), weight_decay=0.0, **fused(base.device)
        )
        self.best = copy.deepcopy(self.student.delta)
        self.loop = TrainingLoop(
            *(name, options, self.files.checkpoint, {"student": self.student, "best": self.best}, self.optimizer),
            identity=self._identity(),
            resume=resume,
            device=base.device,
        )
        self.curve = Curve([Evaluation(**row) for row in self.loop.history])
        self._rows_at_once = max(1, ROWS * 256 * 256 // options.size**2)

    def run(self) -> RunResult:
        """Run the teacher, train to the last step, write the best style.

        Raises:
            TrainingError: a loss that is not finite, or nothing learned.
            InterruptionError: SIGINT or SIGTERM in training; a checkpoint was written.
        """
        self.prepare()
        self.loop.run(self._train_step, self._evaluate, self.on_step)
        return self._finish()

    def prepare(self) -> None:
        """Compute the teacher's samples, also those of a stopped run again, and initialise the student."""
        teacher = Teacher(self.base, self.style, null_rows(self.base), self.options)
        self.train_set, self.val_set = (self._run_teacher(teacher, split) for split in (0, 1))
        self.train_subset = self.train_set[0], self.train_set[1].like(self.val_set[1])
        self.stages = sorted(set(self.val_set[1].stage.tolist()) & set(self.train_set[1].stage.tolist()))
        if left := sorted(set(range(self.style.stages)) - set(self.stages)):
            log.warning("stages %s were not painted and stay unguided", ", ".join(map(str, left)))
        self._distance = self.train_set[1].distance(self.stages)
        if not self.curve.evaluations:
            self._initialise()
            held_out, training = (samples[1].distance(self.stages) for samples in (self.val_set, self.train_subset))
            self._record(Evaluation(0, held_out, training))
            self._evaluate(None)

    def errors(self, samples: Samples) -> tuple[float, ...]:
        """Root mean square of student - target in each stage that is trained, in float32."""
        found = []
        with torch.no_grad():
            for stage in self.stages:
                rows = samples[1].rows(stage)
                parts = rows.split(self._rows_at_once)
                squares = [self._error(samples, part, stage).cpu().double().sum() for part in parts]
                found.append((torch.stack(squares).sum() / samples[1].target[rows].numel()).sqrt().item())
        return tuple(found)

    def _run_teacher(self, teacher: Teacher, split: int) -> Samples:
        """Samples of the teacher for training (`split` 0) or evaluation (1)."""
        options = self.options
        paintings = self.pictures.held_out if split else self.pictures.training
        count = options.held_out_pictures if split else options.pictures
        content = read_content(self.base, paintings, count, options.size, options.seed, split)
        noised = max(2, options.noised // 8) if split else options.noised
        samples = teacher.samples(content, split, noised=noised)
        return content, TeacherSamples.join(list(tqdm(samples, desc=("teacher", "held out")[split], unit="batch")))

    def _initialise(self) -> None:
        """Put every stage at the best point of `INIT_GUIDANCE_GRID` on the line from the null context to the style."""
        init = self.student.init
        null, style = null_rows(self.base).to(init), init.clone()
        chosen = []
        with torch.no_grad():
            for stage in tqdm(self.stages, desc="initialise", unit="stage"):
                rows = self.train_set[1].rows(stage)[:INIT_SAMPLES]
                errors = []
                for scale in INIT_GUIDANCE_GRID:
                    init[stage] = null + scale * (style[stage] - null)
                    parts = rows.split(self._rows_at_once)
                    errors.append(sum(self._error(self.train_set, part, stage).sum().item() for part in parts))
                chosen.append(INIT_GUIDANCE_GRID[errors.index(min(errors))])
                init[stage] = null + chosen[-1] * (style[stage] - null)
        log.info("starts at %s times the style, by stage", ", ".join(f"{scale:g}" for scale in chosen))

    def _error(self, samples: Samples, rows: torch.Tensor, stage: int, training: bool = False) -> torch.Tensor:
        """Squared error of the student at the samples `rows` of one stage, [B, 4, h, w]."""
        base, options, (content, states) = self.base, self.options, samples
        latent, timestep, edges, target = (
            x.to(base.device)
            for x in (
                *(states.latent[rows], states.timestep[rows], content.edges[states.picture[rows]]),
                states.target[rows],
            )
        )
        unet, control = self.student.rows(stage)
        with autocast(base.device, options.mixed_precision if training else "no"):
            residuals = control_residuals(base, latent, timestep, control, edges, options.control_scale)
            predicted = predict(base, latent, timestep, unet, residuals)
        return (predicted.float() - target).square()

    def _train_step(self, step: int) -> float:
        """One step on one stage; its loss is 1 for the unguided style."""
        options = self.options
        set_learning_rate(self.optimizer, options.learning_rate(step))
        index = step % len(self.stages)
        stage = self.stages[index]
        known = self.train_set[1].rows(stage)
        generator = rng_for(options.seed, RngStream.STEP, step)
        rows = known[torch.randint(len(known), (options.batch,), generator=generator)]
        loss = self._error(self.train_set, rows, stage, training=True).mean() / self._distance[index] ** 2
        # The other stages have no gradients and stay; with zero gradients their momentum would move them.
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        require_finite(loss.item(), step)
        self.optimizer.step()
        return loss.item()

    def _evaluate(self, mean_loss: float | None) -> None:
        """Measure the student, and keep it if it is the best so far."""
        step = self.loop.step
        lr = self.options.learning_rate(step - 1) if step else None
        evaluation = Evaluation(step, self.errors(self.val_set), self.errors(self.train_subset), mean_loss, lr)
        self._record(evaluation)
        if self._best_evaluation() is evaluation:
            self.best.load_state_dict(self.student.delta.state_dict())
        log.info(
            "step %d: held out, %.4f of the way from unguided to guided is left; training %.4f",
            *(step, self.curve.relative(evaluation), self.curve.relative_training(evaluation)),
        )
        content = {"name": self.files.name, "options": asdict(self.options)}
        save_curve(self.curve, self.files.curve, content, self.stages)

    def _record(self, evaluation: Evaluation) -> None:
        self.curve.evaluations.append(evaluation)
        self.loop.history.append(asdict(evaluation))

    def _best_evaluation(self) -> Evaluation:
        """The best of the student's evaluations; the first one is of the original style."""
        return min(self.curve.evaluations[1:], key=self.curve.relative)

    def _identity(self) -> dict[str, Any]:
        return {
            **identity(self.options),
            "style": self.style.name,
            "rms": f"{np.sqrt(np.square(self.style.kv_unet, dtype=np.float64).mean()):.9g}",
            "base": self.base.fingerprint,
            "pictures_sha256": self.pictures.digest,
        }

    def _finish(self) -> RunResult:
        best = self._best_evaluation()
        relative = self.curve.relative(best)
        if not relative < 1:
            raise TrainingError(
                f"nothing was learned: the best held-out error is {relative:.4f} of the unguided style's; lower --lr, "
                "or take more --steps or --pictures"
            )
        self.student.delta.load_state_dict(self.best.state_dict())
        meta = distilled_meta(self.style, self.options, relative, best.step, self.pictures.digest)
        kv_unet, name, base = self.student.kv_unet().cpu().numpy(), self.files.name, self.base.fingerprint
        replace(self.style, name=name, base=base, kv_unet=kv_unet, meta=meta).save(self.files.result)
        self.files.checkpoint.unlink(missing_ok=True)
        log.info("kept step %d: %.4f of the way from unguided to guided is left", best.step, relative)
        return RunResult(self.files.result, self.files.curve, self.loop.step, best.step, relative, self.loop.seconds)
