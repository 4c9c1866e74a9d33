"""The one training loop: steps with a progress bar, evaluations, checkpoints, and stops between two steps.

Checkpoints are resumed exactly and hold no pickle: weights, optimiser state and counters in one safetensors file.
"""

import contextlib
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from lsast_engines.environment import peak_memory
from lsast_engines.errors import TrainingError, fault_list, shape_faults
from lsast_engines.files import replace_file

from .run import Evaluation, InterruptionError, warn_of_unwritten

log = logging.getLogger("lsast.train")

_TOLD_AFTER, _TOLD_AGAIN_AFTER = 5, 500
"""Steps after which time and memory are told: early, and once caches are warm."""

_COUNTERS = ("step", "seconds", "history", "losses")


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
        writes: whether this process, the first of several, shows the bar and writes checkpoints.
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
        self.limit: float | None = getattr(options, "seconds", None)
        self.time_left = 1.0
        """Part of `limit` that is left, 1 to 0; 1 without a limit."""
        self.step = 0
        """Steps done."""
        self.seconds = 0.0
        """Wall time of `run`, including that of the parts before a resume."""
        self.history: list[Evaluation] = []
        """A record of each evaluation, as JSON values."""
        self.losses = [0.0, 0]
        """Sum and number of the losses since the last evaluation."""
        if resume and checkpoint.exists():
            self._restore()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors = {f"{name}.{k}": v for name, module in self.modules.items() for k, v in module.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        facts = json.dumps({"identity": self.identity, **{name: getattr(self, name) for name in _COUNTERS}})
        data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, {"facts": facts})
        with replace_file(self.checkpoint) as handle:
            handle.write(data)

    def _restore(self) -> None:
        path = self.checkpoint
        try:
            with path.open("rb"), safe_open(str(path), "pt") as file:
                facts: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise TrainingError(
                f"{path} is not a checkpoint of lsast-train ({error}); start without --resume"
            ) from error
        load_modules(tensors, self.modules, f"{path} was written with other options:")
        known = facts.get("identity", {})
        if faults := [
            f"{key}: found {known.get(key)!r} in the checkpoint, {value!r} now"
            for key, value in self.identity.items()
            if known.get(key) != value
        ]:
            raise TrainingError(fault_list(f"{path} belongs to another run; give the same options:", faults))
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, field = key.split(".")
                entries.setdefault(int(index), {})[field] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        # The file holds contiguous tensors; a fused optimiser reads memory as it lies, channels last as the weights.
        for parameter, entry in self.optimizer.state.items():
            for field, value in entry.items():
                if value.dim() > 1 and value.shape == parameter.shape:
                    entry[field] = torch.empty_like(parameter).copy_(value)
        for name in _COUNTERS:
            setattr(self, name, facts[name])
        log.info("goes on after step %d of %d", self.step, self.options.steps)

    @contextlib.contextmanager
    def finishing(self, result: Path) -> Iterator[None]:
        """Remove the checkpoint after the block, which writes the `result` of a finished run. If the result cannot be
        written, keep one, and raise a `TrainingError` that says whether there is one. The first signal is
        ignored."""
        try:
            with _deferred_signals():
                yield
        except OSError as error:
            with contextlib.suppress(OSError):  # one of an earlier step may be there
                if self.writes:
                    self.save()
            again = ": then go on with --resume" if self.checkpoint.exists() else ""
            raise TrainingError(
                f"cannot write {result} ({error}); expected a place to write to, with room{again}"
            ) from error
        if self.writes:
            self.checkpoint.unlink(missing_ok=True)

    def record(self, held_out: list[float], training: list[float], loss: float | None) -> Evaluation:
        """Append what was measured after the last step to `history`."""
        lr = self.options.learning_rate(self.step - 1) if self.step else None
        row = {"step": self.step, "held_out": held_out, "training": training, "loss": loss, "learning_rate": lr}
        self.history.append(row)
        return row

    def write_log(self, path: Path) -> None:
        """Write the options of the run and `history` as JSON; only a warning tells if that fails."""
        with warn_of_unwritten(), replace_file(path) as handle:
            handle.write(json.dumps({"options": asdict(self.options), "history": self.history}, indent=1).encode())

    def descend(self, loss: torch.Tensor, lr: float, clip: float | None = None) -> float:
        """Take a step of the optimiser down the gradient of a scalar loss, which has to be finite; returns its value.

        `lr` is that of `set_learning_rate`, `clip` the largest norm of the gradient of all weights.
        """
        value: float = loss.item()
        require_finite(value, self.step)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], clip)
        self.optimizer.step()
        return value

    def run(
        self,
        train_step: Callable[[int], float],
        evaluate: Callable[[float], None],
        agree: Callable[[int], int] = int,
    ) -> None:
        """Train to the last step, or as long as `limit` allows.

        Args:
            train_step: takes the step of this number, counted from 0; returns its loss.
            evaluate: gets the mean loss since the evaluation before; appends to `history`.
            agree: takes the signal number of this process, or 0; returns the one on which all processes act.

        Raises:
            InterruptionError: SIGINT or SIGTERM; a checkpoint was written.
            TrainingError: a loss that is not finite.
        """
        began = saved = time.monotonic()
        before, first = self.seconds, self.step
        limit = math.inf if self.limit is None else max(self.limit, 1e-3)
        evaluation = 0.0 if self.limit is None else 0.2 * limit  # a guess, until one is measured
        evaluating = 0.0
        steps = self.options.steps
        done = self.step >= steps
        shown = self.writes and log.isEnabledFor(logging.WARNING)
        bar = tqdm(total=steps, initial=self.step, desc=self.name, unit="step", disable=not shown)
        with bar, _deferred_signals() as signals:
            while not done:
                start = time.monotonic()
                self.time_left = max(0.0, 1 - (start - began) / limit)
                loss = train_step(self.step)
                self.step += 1
                now = time.monotonic()
                due = self.step % self.options.evaluate_every == 0
                another = (now - start) + (1 + due) * evaluation  # a further step and the evaluations until its end
                done = self.step == steps or now - began + another > limit
                self.losses = [self.losses[0] + loss, self.losses[1] + 1]
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if due or done:
                    evaluate(self.losses[0] / self.losses[1])
                    self.losses = [0.0, 0]
                    evaluation = time.monotonic() - now
                    evaluating += evaluation
                now = time.monotonic()
                if self.step - first in (_TOLD_AFTER, _TOLD_AGAIN_AFTER):
                    self.tell((now - began - evaluating) / (self.step - first), evaluation)
                self.seconds = before + now - began
                stop = agree(signals[0] if signals else 0)
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
        left = self.options.steps - self.step
        rest = left * step + math.ceil(left / self.options.evaluate_every) * evaluation
        hours = (rest if self.limit is None else min(rest, self.limit * self.time_left)) / 3600
        log.info("%.3g s a step: %.2g hours for at most %d more%s", step, hours, left, memory)


def load_modules(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], heading: str) -> None:
    """Load into each of `modules` its part of `tensors`, whose names begin with that of the module.

    `TrainingError` with `heading` and the `shape_faults` of all.
    """
    states, faults = {}, []
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        found, wanted = ({key: value.shape for key, value in state.items()} for state in (own, module.state_dict()))
        faults += [f"{name}.{fault}" for fault in shape_faults(found, wanted)]
        states[name] = own
    if faults:
        raise TrainingError(fault_list(heading, faults))
    for name, module in modules.items():
        module.load_state_dict(states[name])


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times the group's ``relative`` (default 1)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("relative", 1.0)


def require_finite(loss: float, step: int) -> None:
    """Raise `TrainingError` if the loss of a step is no number."""
    if not math.isfinite(loss):
        raise TrainingError(f"the loss of step {step} is {loss}; lower --lr, or use --mixed-precision no")


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Notes SIGINT or SIGTERM in the list; a second signal is handled as before. Only the main thread gets signals."""
    noted: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        noted.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        restore()
