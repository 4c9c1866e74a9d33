"""Distillation: a style moved until one pass of the frozen base gives what guidance gives with two.

Guidance doubles the U-Net's work. The style's keys and values are ours to train, so the guided noise of a teacher (the
same base under the original style, `teaching`) is made the target of one pass under a moved style. Every stage is a
problem of its own: a step looks at states of one stage and moves what serves that stage.

The result is an ordinary style with ``guidance_baked`` among its facts. All random numbers come from (seed, purpose,
number), so a resumed run repeats those of an uninterrupted one.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from lsast_engines.errors import TrainingError, UsageError, fault_list

from ..base.baked import BakedBase
from ..base.base import Base
from ..base.kv_packing import kv_layouts
from ..evaluation import Purpose, seeded
from ..inversion import place
from ..options import style_name_faults
from ..paintings import Collection
from ..training.checkpoint import load_checkpoint, save_checkpoint
from ..training.loss_curve import Curve, Evaluation, save_curve
from ..training.signals import InterruptionError, NotedSignals
from .options import DistilOptions
from .result import DistilFiles, DistilOutcome, distilled_meta, write_distilled
from .source_style import SourceStyle, null_rows
from .student import KeyValueStudent, PromptStudent
from .teacher import States, Teacher, read_content, student_schedule
from .teacher_cache import Side, load_lessons, save_lessons

log = logging.getLogger("lsast.train")

SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
"""Starts that are tried: this far along the line from the null context's keys and values through the style's. Were the
base linear in them, the guidance itself would be the answer."""

TRIED = 8
"""States of a stage that the start is chosen by."""

ROWS = 8
"""Rows of an evaluation's call at 256 pixels."""


class Distillation:
    """One run.

    Args:
        base: moved to the device that accelerate chooses; its weights are never changed.
        style: what to start from.
        collection: pictures of any kind, loaded with the options' size, for the teacher to paint.
        options: every knob.
        name: of the new style.
        folder: for the files of the run.
        resume: go on from the checkpoint that a stopped run left in `folder`.
        on_step: called with step and loss after each step; for tests and tools.

    Raises:
        UsageError: a name that is no file name, a size that the base cannot take, a schedule that cannot be laid out.
        TrainingError: a checkpoint that is missing, in the way, damaged, or of another run.
    """

    def __init__(
        self,
        base: Base,
        style: SourceStyle,
        collection: Collection,
        options: DistilOptions,
        name: str,
        folder: Path,
        resume: bool = False,
        on_step: Callable[[int, float], None] | None = None,
    ) -> None:
        faults = style_name_faults(name)
        if options.size % base.config.multiple:
            faults.append(f"size: found {options.size}; expected a multiple of {base.config.multiple}")
        if options.kind == "prompts" and style.prompts is None:
            faults.append("kind: found prompts for a style that was read for kv; read it for prompts")
        if faults:
            raise UsageError(fault_list("this distillation cannot be meant:", faults))
        if options.student_steps:
            student_schedule(options, base.config.noise, style.stages)
        self.base, self.style, self.collection, self.options = base, style, collection, options
        self.files = DistilFiles(folder, name, options.kind)
        if resume and not self.files.checkpoint.exists():
            raise TrainingError(f"found no checkpoint {self.files.checkpoint}; start without --resume")
        if self.files.checkpoint.exists() and not resume:
            raise TrainingError(
                f"found the checkpoint of an unfinished run, {self.files.checkpoint}; go on with --resume, or delete it"
            )
        place(base, Accelerator().device)
        self._resume, self._on_step = resume, on_step
        self.curve = Curve()
        self.step = 0
        self._loss_sum = self._seconds = 0.0

    def run(self) -> DistilOutcome:
        """Let the teacher paint, train to the last step, write the best style.

        Raises:
            TrainingError: a loss that is not finite; nothing learnt.
            InterruptionError: SIGINT or SIGTERM in training; a checkpoint was written.
        """
        self._prepare(BakedBase(self.base))
        signals, options = NotedSignals(), self.options
        began = saved = time.monotonic()
        before = self._seconds
        bar = tqdm(total=options.steps, initial=self.step, desc=self.files.name, unit="step")
        with bar, signals:
            while self.step < options.steps:
                loss = self._train_step()
                self._loss_sum += loss
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if self._on_step is not None:
                    self._on_step(self.step, loss)
                if self.step % options.evaluate_every == 0 or self.step == options.steps:
                    self._evaluate()
                self._seconds = before + time.monotonic() - began
                if signals.number or time.monotonic() - saved > 60 * options.checkpoint_minutes:
                    self._save_checkpoint()
                    saved = time.monotonic()
                if signals.number and self.step < options.steps:
                    raise InterruptionError(signals.number, self.step, self.files.checkpoint)
        return self._finish()

    def errors(self, side: Side) -> tuple[float, ...]:
        """Root mean square of student - target in each stage that is trained, float32 arithmetic."""
        found, states = [], side[1]
        with torch.no_grad():
            for stage in self.stages:
                rows = states.rows(stage)
                squares = [self._error(side, part, stage).double().sum() for part in rows.split(self._at_once)]
                found.append((torch.stack(squares).sum() / states.target[rows].numel()).sqrt().item())
        return tuple(found)

    def _prepare(self, baked: BakedBase) -> None:
        """The teacher's states, the student at its start or where the checkpoint left it."""
        options, base = self.options, self.base
        self._baked = baked
        teacher = Teacher(baked, self.style, null_rows(base), options)
        self._at_once = max(1, ROWS * 256 * 256 // options.size**2)
        self.student = self._make_student(base.device)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=options.lr, betas=(0.9, 0.999), weight_decay=options.weight_decay
        )
        self._best = copy.deepcopy(self.student.moves)
        if self._resume:
            self._restore()
        sides = load_lessons(self.files.lessons, self._taught())
        if sides is None:
            sides = {name: self._teach(teacher, side) for side, name in enumerate(("teach", "held_out"))}
            save_lessons(self.files.lessons, sides, self._taught())
        self.lessons, self.exam = sides["teach"], sides["held_out"]
        self._repeated = self.lessons[0], self.lessons[1].like(self.exam[1])
        self.stages = sorted(set(self.exam[1].stage.tolist()) & set(self.lessons[1].stage.tolist()))
        if left := sorted(set(range(self.style.stages)) - set(self.stages)):
            log.warning("stages %s were not painted and stay unguided", ", ".join(map(str, left)))
        self._size = self.lessons[1].distance(self.stages)
        if not self._resume:
            self._choose_start()
            unseen, seen = (side[1].distance(self.stages) for side in (self.exam, self._repeated))
            self.curve.evaluations.append(Evaluation(0, unseen, seen))
            self._evaluate()

    def _teach(self, teacher: Teacher, side: int) -> Side:
        """Have pictures painted, of `side` 0 to learn from, of 1 held out."""
        options, collection = self.options, self.collection
        paintings = collection.held_out if side else collection.training
        count = options.held_out_pictures if side else options.pictures
        content = read_content(teacher.baked, paintings, count, options.size, options.seed, side)
        few = max(2, options.noised // 8) if side else options.noised
        shown = teacher.states(content, side, noised=few)
        return content, States.join(list(tqdm(shown, desc=("teach", "held out")[side], unit="batch")))

    def _make_student(self, device: torch.device) -> KeyValueStudent | PromptStudent:
        style, baked = self.style, self._baked
        if self.options.kind == "prompts":
            assert style.prompts is not None, "checked at the start"
            return PromptStudent(style.prompts, *kv_layouts(baked.base)).to(device)
        return KeyValueStudent(style.kv_unet, style.kv_control, kv_layouts(baked.base)[0]).to(device)

    def _choose_start(self) -> None:
        """Put every stage at the best of `SCALES` along the line from the null context through the style."""
        student = self.student
        null = self.base.null_context if self.options.kind == "prompts" else null_rows(self.base)
        null = null.to(student.start)
        origin = student.start.clone()
        chosen = []
        with torch.no_grad():
            for stage in tqdm(self.stages, desc="start", unit="stage"):
                rows = self.lessons[1].rows(stage)[:TRIED]
                errors = []
                for scale in SCALES:
                    student.start[stage] = null + scale * (origin[stage] - null)
                    parts = rows.split(self._at_once)
                    errors.append(sum(self._error(self.lessons, part, stage).sum().item() for part in parts))
                chosen.append(SCALES[errors.index(min(errors))])
                student.start[stage] = null + chosen[-1] * (origin[stage] - null)
        log.info("starts at %s times the style, by stage", ", ".join(f"{scale:g}" for scale in chosen))

    def _error(self, side: Side, rows: torch.Tensor, stage: int, training: bool = False) -> torch.Tensor:
        """Squared error of the student at the states `rows` of one stage, [B, 4, h, w]."""
        device, (content, states) = self.base.device, side
        predicted = self._baked.predict(
            states.latent[rows].to(device),
            states.timestep[rows].to(device),
            self.student.rows(stage),
            content.hints[states.picture[rows]].to(device),
            self.options.control,
            self.options.precision if training else "fp32",
        )
        return (predicted.float() - states.target[rows].to(device)).square()

    def _train_step(self) -> float:
        """One step on one stage; returns its loss, 1 for the unguided style."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate(self.step)
        place_of = self.step % len(self.stages)
        stage = self.stages[place_of]
        generator = seeded(options.seed, Purpose.STEP, self.step)
        known = self.lessons[1].rows(stage)
        rows = known[torch.randint(len(known), (options.batch,), generator=generator)]
        loss = self._error(self.lessons, rows, stage, training=True).mean() / self._size[place_of] ** 2
        # Without gradients the other stages stay where they are; with zeros they would drift on their momentum.
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if not math.isfinite(value := loss.item()):
            raise TrainingError(f"the loss of step {self.step} is {value}; lower --lr, or use --precision fp32")
        self.optimizer.step()
        self.step += 1
        return value

    def _evaluate(self) -> None:
        since = self.step % self.options.evaluate_every or self.options.evaluate_every
        trained = self.step > 0
        evaluation = Evaluation(
            self.step,
            self.errors(self.exam),
            self.errors(self._repeated),
            self._loss_sum / since if trained else None,
            self.options.learning_rate(self.step - 1) if trained else None,
        )
        self._loss_sum = 0.0
        self.curve.evaluations.append(evaluation)
        if self._kept() is evaluation:
            self._best.load_state_dict(self.student.moves.state_dict())
        log.info(
            "step %d: held out, %.4f of the way from unguided to guided is left; training %.4f",
            self.step,
            self.curve.relative(evaluation),
            self.curve.relative_training(evaluation),
        )
        save_curve(
            self.curve, self.files.curve, {"name": self.files.name, "options": asdict(self.options)}, self.stages
        )

    def _kept(self) -> Evaluation:
        """The best of the student's evaluations; the first one is the original style's."""
        return min(self.curve.evaluations[1:], key=self.curve.relative)

    def _identity(self) -> dict[str, Any]:
        knobs = asdict(self.options)
        del knobs["checkpoint_minutes"]
        style = {"style": self.style.name, "rms": f"{self.style.kv_unet.square().mean().sqrt().item():.9g}"}
        return {**knobs, **style, "base": self.base.fingerprint, "pictures_sha256": self.collection.digest}

    def _taught(self) -> dict[str, Any]:
        """What the teacher's states depend on."""
        names = ("guidance", "student_steps", "teacher_steps", "strength", "solver", "control", "pictures", "noised",
                 "size", "seed", "style", "rms", "base", "pictures_sha256")  # fmt: skip
        return {name: value for name, value in self._identity().items() if name in names}

    def _save_checkpoint(self) -> None:
        facts = {
            "identity": self._identity(),
            "step": self.step,
            "loss_sum": self._loss_sum,
            "seconds": self._seconds,
            "curve": self.curve.to_json(),
        }
        save_checkpoint(self.files.checkpoint, {"student": self.student, "best": self._best}, self.optimizer, facts)

    def _restore(self) -> None:
        modules = {"student": self.student, "best": self._best}
        facts = load_checkpoint(self.files.checkpoint, modules, self.optimizer)
        own, known = self._identity(), facts.get("identity", {})
        if faults := [
            f"{key}: found {known.get(key)!r} in the checkpoint, {own[key]!r} now"
            for key in own
            if known.get(key) != own[key]
        ]:
            where = f"{self.files.checkpoint} belongs to another run; give the same options:"
            raise TrainingError(fault_list(where, faults))
        self.step, self._loss_sum, self._seconds = facts["step"], facts["loss_sum"], facts["seconds"]
        self.curve = Curve.from_json(facts["curve"])
        log.info("goes on after step %d of %d", self.step, self.options.steps)

    def _finish(self) -> DistilOutcome:
        kept = self._kept()
        relative = self.curve.relative(kept)
        if not relative < 1:
            raise TrainingError(
                f"nothing was learnt: the best held-out error is {relative:.4f} of the unguided style's; lower --lr, "
                "or take more --steps or --pictures"
            )
        self.student.moves.load_state_dict(self._best.state_dict())
        meta = distilled_meta(self.style, self.options, relative, kept.step, self.collection.digest)
        write_distilled(self.student, self.style, self.base, self.files, meta)
        for file in (self.files.checkpoint, self.files.lessons):
            file.unlink(missing_ok=True)
        log.info("kept step %d: %.4f of the way from unguided to guided is left", kept.step, relative)
        return DistilOutcome(self.files.result, self.files.curve, self.step, kept.step, relative, self._seconds)
