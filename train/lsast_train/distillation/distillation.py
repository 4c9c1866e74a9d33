"""Distillation: a style trained until one pass of the frozen base gives what guidance gives with two.

Guidance doubles the U-Net's work. A style's keys and values can be trained, so the guided noise of a teacher (the same
base under the original style, `lsast_train.distillation.teacher`) is the target of one pass under the trained style.
Stages are independent: a step uses samples of one stage and changes that stage alone.

The result is an ordinary style with ``guidance_baked`` in its metadata.
"""

import copy
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lsast_engines.bundle.style import DISTILLED_GUIDANCE_KEY, Style, decode_defaults, encode_defaults
from lsast_engines.errors import TrainingError, UsageError, fault_list

from ..base.attention import packed_kv
from ..base.base import Base, autocast
from ..options import DistillOptions
from ..paintings import PaintingDataset, shows_bars
from ..training.loop import TrainingLoop
from ..training.rng import RngStream, rng_for
from ..training.run import LossCurve, RunFiles, RunResult, find_device, fused, versions
from .student import Student, null_rows
from .teacher import Teacher, TeacherSamples, read_contents

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
        name, folder, resume, device: as of `lsast_train.inversion.Inversion`; without a device a GPU, if one is there.

    Raises:
        UsageError, TrainingError: as `Inversion`; or invalid defaults of the style.
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
        device: str | None = None,
    ) -> None:
        self.files = RunFiles(folder, name, prompts=False)
        self.files.require(options.size, base.config.multiple, resume)
        self.base, self.style, self.pictures, self.options = base, style, pictures, options
        self.defaults, faults = decode_defaults(style.meta)
        if faults:
            raise UsageError(fault_list(f"style {style.name!r} has invalid defaults:", faults))
        base.to(find_device(device))
        self.student = Student(style, base.unet).to(base.device)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=options.lr, betas=(0.9, 0.999), weight_decay=0.0, **fused(base.device)
        )
        self.best = copy.deepcopy(self.student.delta)
        identity = {
            **options.identity(),
            "style": style.name,
            "rms": f"{np.sqrt(np.square(style.kv_unet, dtype=np.float64).mean()):.9g}",
            "base": base.fingerprint,
            "pictures_sha256": pictures.digest,
        }
        self.loop = TrainingLoop(
            *(name, options, self.files.checkpoint, {"student": self.student, "best": self.best}, self.optimizer),
            identity=identity,
            resume=resume,
            device=base.device,
        )
        self.curve = LossCurve(self.loop.history)
        self._rows_at_once = max(1, ROWS * 256 * 256 // options.size**2)

    def run(self) -> RunResult:
        """Run the teacher, also again for a stopped run; train to the last step, write the best style.

        Errors are those of `TrainingLoop.run` and `finishing`, and a `TrainingError` if nothing was learned.
        """
        options, teacher = self.options, Teacher(self.base, self.style, null_rows(self.base), self.options)
        sets = []
        for split, (pictures, count, noised) in enumerate(
            (
                (self.pictures.training, options.pictures, options.noised),
                (self.pictures.held_out, max(2, options.pictures // 8), max(2, options.noised // 8)),
            )
        ):
            contents = read_contents(self.base, pictures, count, options.size, options.seed, split)
            sets.append(teacher.samples(contents, split, noised))
        self.train_set, self.val_set = sets
        self.train_subset = self.train_set.like(self.val_set)
        self.stages = sorted(set(self.val_set.stage.tolist()) & set(self.train_set.stage.tolist()))
        if left := sorted(set(range(self.style.stages)) - set(self.stages)):
            log.warning("stages %s were not painted and stay unguided", ", ".join(map(str, left)))
        self._distance = self.train_set.distance(self.stages)
        if not self.loop.history:
            self._initialise()
            held_out, training = (samples.distance(self.stages) for samples in (self.val_set, self.train_subset))
            self.loop.record(held_out, training, None)  # the original style
            self._evaluate(None)
        self.loop.run(self._train_step, self._evaluate)
        with self.loop.finishing(self.files.result):
            return self._finish()

    def _initialise(self) -> None:
        """Put every stage at the best point of `INIT_GUIDANCE_GRID` on the line from the null context to the style."""
        init = self.student.init
        null, style = null_rows(self.base).to(init), init.clone()
        chosen = []
        for stage in tqdm(self.stages, desc="initialise", unit="stage", disable=not shows_bars()):
            rows = self.train_set.rows(stage)[:INIT_SAMPLES]
            errors = []
            for scale in INIT_GUIDANCE_GRID:
                init[stage] = null + scale * (style[stage] - null)
                errors.append(self._sum(self.train_set, rows, stage))
            chosen.append(INIT_GUIDANCE_GRID[errors.index(min(errors))])
            init[stage] = null + chosen[-1] * (style[stage] - null)
        log.info("starts at %s times the style, by stage", ", ".join(f"{scale:g}" for scale in chosen))

    def _error(self, samples: TeacherSamples, rows: torch.Tensor, stage: int, training: bool = False) -> torch.Tensor:
        """Squared error of the student at the samples `rows` of one stage, [B, 4, h, w]."""
        base, options, edges = self.base, self.options, samples.edges[samples.picture[rows]]
        parts = (samples.latent[rows], samples.timestep[rows], edges, samples.target[rows])
        latent, timestep, edges, target = (part.to(base.device) for part in parts)
        unet, control = (packed_kv(rows.expand(len(latent), -1, -1)) for rows in self.student.rows(stage))
        with autocast(base.device, options.mixed_precision if training else "no"):
            residuals = base.control(latent, timestep, control, edges, options.control_scale)
            predicted = base.eps(latent, timestep, unet, residuals=residuals)
        return (predicted.float() - target).square()

    @torch.no_grad()
    def _sum(self, samples: TeacherSamples, rows: torch.Tensor, stage: int) -> float:
        parts = rows.split(self._rows_at_once)
        return sum(self._error(samples, part, stage).cpu().double().sum().item() for part in parts)

    def _train_step(self, step: int) -> float:
        """One step on one stage; its loss is 1 for the unguided style."""
        index = step % len(self.stages)
        known = self.train_set.rows(self.stages[index])
        generator = rng_for(self.options.seed, RngStream.STEP, step)
        rows = known[torch.randint(len(known), (self.options.batch,), generator=generator)]
        loss = self._error(self.train_set, rows, self.stages[index], training=True).mean()
        # The other stages have no gradients and stay; with zero gradients their momentum would move them.
        return self.loop.descend(loss / self._distance[index] ** 2, self.options.learning_rate(step))

    def _errors(self, samples: TeacherSamples) -> list[float]:
        """Root mean square of student - target in each stage that is trained, in float32."""
        rows = {stage: samples.rows(stage) for stage in self.stages}
        return [(self._sum(samples, at, stage) / samples.target[at].numel()) ** 0.5 for stage, at in rows.items()]

    def _evaluate(self, mean_loss: float | None) -> None:
        """Measure the student, and keep it if it is the best so far."""
        row = self.loop.record(self._errors(self.val_set), self._errors(self.train_subset), mean_loss)
        if self.curve.best(1) is row:
            self.best.load_state_dict(self.student.delta.state_dict())
        log.info(
            "step %d: held out, %.4f of the way from unguided to guided is left; training %.4f",
            *(self.loop.step, self.curve.relative(row), self.curve.relative(row, "training")),
        )
        facts = {"name": self.files.name, "options": asdict(self.options)}
        self.curve.save(self.files.curve, facts, self.stages)

    def _finish(self) -> RunResult:
        row = self.curve.best(1)
        best, relative, files = row["step"], self.curve.relative(row), self.files
        if not relative < 1:
            raise TrainingError(
                f"nothing was learned: the best held-out error is {relative:.4f} of the unguided style's; lower --lr, "
                "or take more --steps or --pictures"
            )
        self.student.delta.load_state_dict(self.best.state_dict())
        meta = {
            **{key: value for key, value in self.style.meta.items() if key != "defaults"},
            **encode_defaults({key: value for key, value in self.defaults.items() if key != "guidance"}),
            DISTILLED_GUIDANCE_KEY: f"{self.options.guidance:g}",
            "distilled_from": self.style.name,
            "distill_options": json.dumps(asdict(self.options), sort_keys=True),
            "distill_images_sha256": self.pictures.digest,
            "distill_step": str(best),
            "distill_relative_error": f"{relative:.6f}",
            "distill_versions": json.dumps(versions()),
        }
        with torch.no_grad():
            kv_unet = torch.stack([self.student.rows(stage)[0] for stage in range(self.style.stages)]).cpu().numpy()
        style = replace(self.style, name=files.name, base=self.base.fingerprint, kv_unet=kv_unet, meta=meta)
        style.save(files.result)
        log.info("kept step %d: %.4f of the way from unguided to guided is left", best, relative)
        return RunResult(files.result, files.curve, self.loop.step, best, relative, self.loop.seconds)
