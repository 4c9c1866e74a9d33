"""A run: the files that it writes, whether it can begin, its device, its loss curve and its result.

Never imports torch before a device is asked for, so that ``lsast-train --help`` is quick and works without it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsast_engines.bundle.style import style_name_faults
from lsast_engines.environment import package_version
from lsast_engines.errors import TrainingError, UsageError, fault_list
from lsast_engines.files import lock_file, make_folder, replace_file, require_writable

if TYPE_CHECKING:
    import torch

log = logging.getLogger("lsast.train")

CURVE_FORMAT = 1
"""Format number of the loss curve's JSON."""


class InterruptionError(TrainingError):
    """A signal stopped the run after a whole step, and a checkpoint was written; the exit status is 128 + signal."""

    def __init__(self, number: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; {checkpoint} is whole: go on with --resume")
        self.exit_code = 128 + number


@contextlib.contextmanager
def warn_of_unwritten() -> Iterator[None]:
    """Makes a warning of an error of the block, which writes a loss curve: no run ends by it."""
    try:
        yield
    except OSError as error:
        log.warning("the loss curve cannot be written: %s", error)


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes: one folder, under the style's name."""

    folder: Path
    name: str
    prompts: bool = True
    """Whether the result is a prompt file, or else a style file."""

    @property
    def result(self) -> Path:
        """The prompt file or style file."""
        return self.folder / f"{self.name}{'.prompts' * self.prompts}.safetensors"

    @property
    def checkpoint(self) -> Path:
        """There only while a run is unfinished."""
        return self.folder / f"{self.name}.checkpoint.safetensors"

    @property
    def curve(self) -> Path:
        """The losses as JSON; the picture has the suffix ``.png``."""
        return self.folder / f"{self.name}.curve.json"

    def require(self, size: int, multiple: int, resume: bool, overwrite: bool = True) -> None:
        """Refuse a run that cannot begin.

        Args:
            size: side of its pictures in pixels; the base's are multiples of `multiple`.
            resume: whether it goes on from a checkpoint.
            overwrite: whether it may replace the result of a finished run, if it does not go on.

        Raises:
            UsageError: a name that is no file name, and a size that the base cannot take; or an unwritable folder.
            TrainingError: a checkpoint that is missing, or in the way; a result that is not to be replaced.
        """
        faults = style_name_faults(self.name)
        if size % multiple:
            faults.append(f"size: found {size}; expected a multiple of {multiple} for this base")
        if faults:
            raise UsageError(fault_list("invalid options:", faults))
        path = self.checkpoint
        if resume and not path.exists():
            raise TrainingError(f"found no checkpoint {path}; start without --resume")
        if path.exists() and not resume:
            raise TrainingError(f"found the checkpoint of an unfinished run, {path}; go on with --resume, or delete it")
        if not (resume or overwrite) and self.result.exists():
            raise TrainingError(
                f"found a finished training, {self.result}; name another folder with --out, or train again with "
                "--overwrite"
            )
        require_writable(self.folder)

    @contextlib.contextmanager
    def reserved(
        self, size: int, multiple: int, resume: bool, overwrite: bool = True, writes: bool = True
    ) -> Iterator[None]:
        """`require`, and refuse other runs with a `TrainingError` while the block runs; of several processes only that
        which `writes` locks. An OSError if the folder cannot be written."""
        self.require(size, multiple, resume, overwrite)
        if not writes:
            yield
            return
        make_folder(self.folder)
        lock = self.folder / f".{self.name}.lock"
        if (descriptor := lock_file(lock)) < 0:
            raise TrainingError(f"{self.result} is being trained by another run; wait for it, or name another --out")
        try:
            self.require(size, multiple, resume, overwrite)  # another run may have ended meanwhile
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                lock.unlink()
            os.close(descriptor)


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run."""

    file: Path
    """The prompt file or style file."""
    curve: Path
    steps: int
    best_step: int
    """Step of the evaluation with the lowest held-out loss, whose values were kept; of `finetune` the last step."""
    relative_loss: float
    """Its held-out loss relative to the start: to the initial prompts, or to the style without guidance."""
    seconds: float
    """Wall time of the steps, including those before a resume."""


Evaluation = dict[str, Any]
"""What was measured after a number of steps: ``step``; ``held_out`` and ``training``, mean squared errors of the noise
(`distill`: root mean squares to the teacher) on paintings that training never sees and on some that it does, one for
each stage; ``loss``, the mean training loss since the evaluation before; ``learning_rate`` of the last step. The last
two are None at step 0."""


class LossCurve:
    """The evaluations of a run, from step 0 on, the initial prompts. It over-fits where the training curve falls and
    the held-out curve rises."""

    def __init__(self, evaluations: list[Evaluation]) -> None:
        self.evaluations = evaluations

    def relative(self, evaluation: Evaluation, part: str = "held_out") -> float:
        """The loss relative to that of the initial prompts, stage by stage, then averaged: losses differ a hundredfold
        between stages, and a plain mean would let the clean end decide alone."""
        initial: list[float] = self.evaluations[0][part]
        return float(sum(new / old for new, old in zip(evaluation[part], initial, strict=True)) / len(initial))

    def best(self, first: int = 0) -> Evaluation:
        """The evaluation with the lowest relative held-out loss, from number `first` on; the earliest of equals."""
        return min(self.evaluations[first:], key=self.relative)

    def save(self, path: Path, facts: dict[str, Any], stages: Sequence[int] | None = None) -> None:
        """Write ``path`` (JSON with `facts`) and the same name with ``.png``; only a warning tells if that fails.

        `stages` are the numbers of the stages that the losses are of; None is 0, 1, 2 …
        """
        best = self.best()
        rows = [
            {**row, **{f"relative_{part}": self.relative(row, part) for part in ("held_out", "training")}}
            for row in self.evaluations
        ]
        stages = list(range(len(best["held_out"])) if stages is None else stages)
        document = {"format": CURVE_FORMAT, **facts, "stages": stages, "best_step": best["step"], "evaluations": rows}
        with warn_of_unwritten(), replace_file(path) as handle:
            handle.write(json.dumps(document, indent=1).encode())
        with warn_of_unwritten(), replace_file(path.with_suffix(".png")) as handle:
            handle.write(self._plot(best, facts.get("name", ""), stages))

    def _plot(self, best: Evaluation, title: str, stages: list[int]) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Without pyplot: no window system is asked for and no global state is left behind.
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        over_steps, over_stages = figure.subplots(1, 2)
        steps = [row["step"] for row in self.evaluations]
        for part, line, label in (("held_out", "o-", "held out"), ("training", ".--", "training")):
            over_steps.plot(steps, [self.relative(row, part) for row in self.evaluations], line, label=label)
        over_steps.axvline(best["step"], color="grey", linewidth=0.8, label=f"kept: {best['step']}")
        over_steps.set(xlabel="step", ylabel="noise error / initial", title=title)
        over_steps.legend()
        pairs = zip(best["held_out"], self.evaluations[0]["held_out"], strict=True)
        over_stages.bar(stages, [100 * (new / old - 1) for new, old in pairs])
        over_stages.axhline(0, color="grey", linewidth=0.8)
        title = f"held-out noise error at step {best['step']}"
        over_stages.set(xlabel="stage (0: clean end)", ylabel="change [%]", title=title, xticks=stages)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
        return buffer.getvalue()


def versions() -> dict[str, str]:
    """Versions of the libraries that compute."""
    return {name: package_version(name) for name in ("lsast", "torch", "diffusers")}


def find_device(name: str | None) -> torch.device:
    """The device that torch calls `name`; None and ``auto`` are a GPU of CUDA if one is there, or else the CPU.

    `UsageError` if it is not there.
    """
    import torch

    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises for a device not there
        count = torch.cuda.device_count()
        found = ["cpu", *(f"cuda:{i}" for i in range(count)), *(["mps"] if torch.backends.mps.is_available() else [])]
        reason = str(error).split("\n")[0]
        raise UsageError(f"found --device {name} ({reason}); expected one of {', '.join(found)}") from error


def fused(device: torch.device) -> dict[str, bool]:
    """The arguments of an optimiser on `device`: one kernel for all weights on a GPU."""
    return {"fused": True} if device.type == "cuda" else {}
