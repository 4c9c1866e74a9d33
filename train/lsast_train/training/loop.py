"""The one training loop: steps with a progress bar, evaluations, checkpoints, and stops between two steps."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lsast_engines.environment import peak_memory
from lsast_engines.errors import TrainingError, fault_list
from lsast_engines.files import replace_file

from .signals import DeferredSignals, InterruptionError
from .training_state import load_checkpoint, save_checkpoint

log = logging.getLogger("lsast.train")

_TOLD_AFTER, _TOLD_AGAIN_AFTER = 5, 500
"""Steps after which time and memory are told: early, and once caches are warm."""


class TrainingLoop:
    """Runs a training step again and again.

    Args:
        name: shown beside the progress bar.
        options: a dataclass with `steps`, `evaluate_every` (the last step is followed by an evaluation, too),
            `checkpoint_minutes`, and perhaps `seconds` that `run` may take: the last step and its evaluation end within
            them, and at least one step is taken; for one process only.
        modules, optimizer: their states are in the checkpoint.
        identity: what a resumed run must have in common with its checkpoint, as JSON values.
        resume: go on from the checkpoint, if it is there.
        writes: whether this process shows the bar and writes checkpoints: the first one of several.
        device: whose peak memory is told; None for the process's own.

    Raises:
        TrainingError: a checkpoint that is damaged or of another run.
    """

    def __init__(
        self,
        name: str,
        options: Any,
        checkpoint: Path,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        identity: Mapping[str, Any] | None = None,
        resume: bool = False,
        writes: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.options, self.checkpoint = name, options, checkpoint
        self.modules, self.optimizer, self.identity = modules, optimizer, dict(identity or {})
        self.writes, self.device = writes, device
        self.steps: int = options.steps
        self.limit: float | None = getattr(options, "seconds", None)
        self.time_left = 1.0
        """Part of `limit` that is left, 1 to 0; 1 without a limit."""
        self.step = 0
        """Steps done."""
        self.seconds = 0.0
        """Wall time of `run`, including that of the parts before a resume."""
        self.history: list[dict[str, Any]] = []
        """A record of each evaluation, as JSON values."""
        self._losses = [0.0, 0]
        if resume and checkpoint.exists():
            self._restore()

    def _restore(self) -> None:
        state = load_checkpoint(self.checkpoint, self.modules, self.optimizer)
        known = state.get("identity", {})
        if faults := [
            f"{key}: found {known.get(key)!r} in the checkpoint, {value!r} now"
            for key, value in self.identity.items()
            if known.get(key) != value
        ]:
            raise TrainingError(fault_list(f"{self.checkpoint} belongs to another run; give the same options:", faults))
        self.step, self.seconds, self.history, self._losses = (
            state[key] for key in ("step", "seconds", "history", "losses")
        )
        log.info("goes on after step %d of %d", self.step, self.steps)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "losses": self._losses,
        }
        save_checkpoint(self.checkpoint, self.modules, self.optimizer, state)

    def write_log(self, path: Path) -> None:
        """Write the options of the run and `history` as JSON."""
        with replace_file(path) as handle:
            handle.write(json.dumps({"options": asdict(self.options), "history": self.history}, indent=1).encode())

    def run(
        self,
        train_step: Callable[[int], float],
        evaluate: Callable[[float], None],
        on_step: Callable[[int, float], None] | None = None,
        agree: Callable[[int], int] = int,
    ) -> None:
        """Train to the last step, or as long as `limit` allows.

        Args:
            train_step: takes the step of this number, counted from 0; returns its loss.
            evaluate: gets the mean loss since the evaluation before; appends to `history`.
            on_step: called with the number of steps done and the loss after each step.
            agree: makes the signal of one process, or 0, that of all processes.

        Raises:
            InterruptionError: SIGINT or SIGTERM; a checkpoint was written.
        """
        began = saved = time.monotonic()
        before, first = self.seconds, self.step
        limit = math.inf if self.limit is None else max(self.limit, 1e-3)
        evaluation = 0.0 if self.limit is None else 0.2 * limit  # a guess, until one is measured
        evaluating = 0.0
        done = self.step >= self.steps
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step", disable=not self.writes)
        with bar, DeferredSignals() as signals:
            while not done:
                start = time.monotonic()
                self.time_left = max(0.0, 1 - (start - began) / limit)
                loss = train_step(self.step)
                self.step += 1
                now = time.monotonic()
                due = self.step % self.options.evaluate_every == 0
                another = (now - start) + (1 + due) * evaluation  # a further step and the evaluations until its end
                done = self.step == self.steps or now - began + another > limit
                self._losses = [self._losses[0] + loss, self._losses[1] + 1]
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if on_step is not None:
                    on_step(self.step, loss)
                if due or done:
                    evaluate(self._losses[0] / self._losses[1])
                    self._losses = [0.0, 0]
                    evaluation = time.monotonic() - now
                    evaluating += evaluation
                now = time.monotonic()
                if self.step - first in (_TOLD_AFTER, _TOLD_AGAIN_AFTER):
                    self.tell((now - began - evaluating) / (self.step - first), evaluation)
                self.seconds = before + now - began
                stop = agree(signals.number)
                if self.writes and (stop or now - saved > 60 * self.options.checkpoint_minutes):
                    self.save()
                    saved = now
                if stop and not done:
                    raise InterruptionError(stop, self.step, self.checkpoint)

    def tell(self, step: float, evaluation: float) -> None:
        """Log how long the rest will take at so many seconds a `step` and an `evaluation`, and the peak of memory."""
        if not self.writes:
            return
        cuda = self.device is not None and self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else peak_memory()
        memory = "" if peak is None else f"; peak memory {peak / 1e9:.2f} GB"
        left = self.steps - self.step
        rest = left * step + math.ceil(left / self.options.evaluate_every) * evaluation
        hours = (rest if self.limit is None else min(rest, self.limit * self.time_left)) / 3600
        log.info("%.3g s a step: %.2g hours for at most %d more%s", step, hours, left, memory)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times the group's ``relative`` (default 1)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("relative", 1.0)


def require_finite(loss: float, step: int) -> None:
    """Raise `TrainingError` if the loss of a step is no number."""
    if not math.isfinite(loss):
        raise TrainingError(f"the loss of step {step} is {loss}; lower --lr, or use --mixed-precision no")
