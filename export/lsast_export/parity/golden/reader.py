"""Reads golden sets: what LSAST's released code computed, as files ``PREFIX_….safetensors``.

====================== ==========================================================================================
``PREFIX_unet``        the U-Net in CompVis naming (``model.diffusion_model.*``)
``PREFIX_control``     its ControlNet (``control_model.*``)
``PREFIX_io``          one sampling run: z0, noise, hint, contexts [K, T, dim], unconditional [T, dim], then
                       start_latent, the n latents_in, eps_cond and eps_uncond of every step, the first step's
                       control_residual_00 …, final_latent
``PREFIX_train``       optional; for case i: i_z, i_noise, i_t, i_contexts, then i_loss, i_grad_index, i_grad
====================== ==========================================================================================

Metadata (steps, strength, guidance, num_heads) may be missing; the recorded run then shows them, and a note says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lsast_engines.diffusion.noise_schedule import NoiseSchedule
from lsast_engines.diffusion.timesteps import TimestepSchedule
from lsast_engines.errors import ExportError, UsageError, fault_list
from lsast_train.base.attention import GROUPS

from .golden_set import RESIDUAL, STAGES, GoldenSet, TrainingCase

_STEPS, _GUIDANCE = 50, 10.0
"""The released code's defaults (docs/method.md §4)."""


def read_golden(prefix: Path) -> GoldenSet:
    """Read the files of a golden set.

    Raises:
        ExportError: files or tensors that are missing, of other shapes or not finite, metadata that cannot be read or
            contradict the record; all faults at once.
    """
    faults: list[str] = []
    unet, unet_says = _load(prefix, "unet", faults)
    control, control_says = _load(prefix, "control", faults)
    tensors, says = _load(prefix, "io", faults)
    training = _load(prefix, "train", faults)[0] if _path(prefix, "train").is_file() else {}
    if faults:
        raise ExportError(fault_list(f"found no golden set {prefix}_…:", faults))
    reader = _Reader(tensors, {**unet_says, **control_says, **says}, faults)
    golden = reader.golden(prefix, unet, control, _training(training, faults))
    if faults or golden is None:
        raise ExportError(fault_list(f"{_path(prefix, 'io')} is not a golden set that can be run:", faults))
    return golden


class _Reader:
    """Tensors and metadata of ``PREFIX_io``; collects faults and notes."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], says: Mapping[str, str], faults: list[str]) -> None:
        self.tensors, self.says, self.faults = tensors, says, faults
        self.notes: list[str] = []

    def golden(
        self,
        prefix: Path,
        unet: dict[str, torch.Tensor],
        control: dict[str, torch.Tensor],
        training: tuple[TrainingCase, ...],
    ) -> GoldenSet | None:
        guidance = self._number("guidance")
        guided = self._is_guided(guidance)
        stacks = ["latents_in", "eps_cond", *(["eps_uncond"] if guided else [])]
        needed = ["z0", "noise", "hint", "contexts", "start_latent", "final_latent", *stacks]
        needed += ["unconditional"] if guided else []
        residuals = sorted(name for name in self.tensors if name.startswith(RESIDUAL))
        self.faults += [f"{name}: missing" for name in needed if name not in self.tensors]
        self.faults += [] if residuals else [f"{RESIDUAL}00 …: missing"]
        if self.faults:
            return None
        z0 = self._batched("z0")
        size = tuple(z0.shape)
        contexts = self._contexts(size[0])
        stacked = {name: self._stacked(name, size) for name in stacks}
        steps = len(stacked["latents_in"])
        self.faults += [
            f"{name}: found {len(tensor)} steps; expected {steps}, as in latents_in"
            for name, tensor in stacked.items()
            if len(tensor) != steps
        ]
        single = {name: self._batched(name, size) for name in ("noise", "start_latent", "final_latent")}
        hint = self._batched("hint", (size[0], 3, 8 * size[2], 8 * size[3]))
        if guidance is None:
            guidance = _GUIDANCE if guided else 1.0
            self.notes.append(f"guidance: not in the metadata; {guidance:g} is taken")
        if not guided and guidance != 1:
            self.faults.append(f"eps_uncond: missing; expected with guidance {guidance:g}")
        recorded = self.tensors.get("timesteps")
        timesteps = None if recorded is None else tuple(int(t) for t in recorded.flatten())
        schedule = self._schedule(steps, timesteps)
        unconditional = self._unconditional(contexts) if guided else torch.zeros_like(contexts[0, 0])
        heads = self._whole_number("num_heads")
        if self.faults or schedule is None:
            return None
        read = max(step.stage for step in schedule.steps) + len(GROUPS)
        if len(contexts) < read:
            self.faults.append(f"contexts: found {len(contexts)}; expected at least {read} for these steps")
            return None
        return GoldenSet(
            prefix=prefix,
            unet=unet,
            control=control,
            heads=heads if heads and heads > 0 else None,
            guidance=guidance,
            schedule=schedule,
            z0=z0,
            hint=hint,
            contexts=contexts,
            unconditional=unconditional,
            latents_in=stacked["latents_in"],
            eps_cond=stacked["eps_cond"],
            eps_uncond=stacked.get("eps_uncond"),
            **single,
            residuals=tuple(self.tensors[name] for name in residuals),
            timesteps=timesteps,
            training=training,
            notes=tuple(self.notes),
        )

    def _is_guided(self, guidance: float | None) -> bool:
        """Whether the set has an unconditional half; at guidance 1 a copy of the other half does not count."""
        null = self.tensors.get("eps_uncond")
        if null is None or null.numel() == 0:
            return False
        return guidance != 1 or "eps_cond" not in self.tensors or not torch.equal(null, self.tensors["eps_cond"])

    def _batched(self, name: str, size: tuple[int, ...] | None = None) -> torch.Tensor:
        """A tensor [B, C, h, w], of `size`; the batch axis may be missing or of length 1."""
        tensor = self.tensors[name]
        tensor = tensor[None] if tensor.ndim == 3 else tensor
        if size is not None and tensor.ndim == 4 and len(tensor) == 1:
            tensor = tensor.expand(size[0], *tensor.shape[1:])
        if tensor.ndim != 4 or (size is not None and tensor.shape != size):
            expected = "[B, 4, h, w]" if size is None else list(size)
            self.faults.append(f"{name}: found shape {list(self.tensors[name].shape)}; expected {expected}")
            return torch.zeros(size or (1, 1, 1, 1))
        return tensor

    def _stacked(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        """A tensor [n, B, 4, h, w]; the batch axis may be missing, or one with the steps."""
        tensor = self.tensors[name]
        if tensor.ndim < 4 or tuple(tensor.shape[-3:]) != size[1:] or tensor.numel() % math.prod(size):
            self.faults.append(f"{name}: found shape {list(tensor.shape)}; expected [n, {', '.join(map(str, size))}]")
            return torch.zeros(1, *size)
        return tensor.reshape(-1, *size)

    def _contexts(self, batch: int) -> torch.Tensor:
        """[K, B, T, dim]; the batch axis may be missing or of length 1."""
        tensor = self.tensors["contexts"]
        tensor = tensor[:, None] if tensor.ndim == 3 else tensor
        if tensor.ndim != 4 or tensor.shape[1] not in (1, batch):
            self.faults.append(f"contexts: found shape {list(self.tensors['contexts'].shape)}; expected [K, T, dim]")
            return torch.zeros(1, 1, 1, 1)
        return tensor.expand(-1, batch, -1, -1)

    def _unconditional(self, contexts: torch.Tensor) -> torch.Tensor:
        """[T, dim]; a set may repeat it for every context, as the released code does."""
        tensor = self.tensors["unconditional"]
        shape = contexts.shape[2:]
        if tensor.ndim < 2 or tensor.shape[-2:] != shape:
            self.faults.append(f"unconditional: found shape {list(tensor.shape)}; expected {list(shape)}")
            return torch.zeros(shape)
        rows = tensor.reshape(-1, *shape)
        if not (rows == rows[0]).all():
            self.faults.append(f"unconditional: found {len(rows)} that differ; expected one")
        return rows[0]

    def _number(self, name: str, kind: str = "a number") -> float | None:
        """A number of the metadata, None if it is not there."""
        text = self.says.get(name)
        if text is None or text.strip().lower() in ("", "none", "null"):
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or ("whole" in kind and value != int(value)):
            self.faults.append(f"metadata {name}: found {text!r}; expected {kind}")
            return None
        return value

    def _whole_number(self, name: str) -> int | None:
        value = self._number(name, "a whole number")
        return None if value is None else int(value)

    def _schedule(self, count: int, timesteps: tuple[int, ...] | None) -> TimestepSchedule | None:
        """The run's schedule, which must have the recorded number of steps, `count`."""
        steps, strength = self._whole_number("steps"), self._number("strength")
        if steps is None:
            steps = _steps_of(timesteps, count)
            self.notes.append(f"steps: not in the metadata; {steps} fits the record")
        if strength is None:
            # Half a step more, so that the product is not rounded down to count - 1.
            strength = min((count + 0.5) / steps, 1.0)
            self.notes.append(f"strength: not in the metadata; {strength:g} fits the record")
        try:
            schedule = TimestepSchedule.build(NoiseSchedule(), steps, strength, STAGES, "ddim_lsast")
        except UsageError as error:
            self.faults.append(f"metadata: {error}")
            return None
        if len(schedule.steps) != count:
            self.faults.append(
                f"latents_in: found {count} steps; expected {len(schedule.steps)}, those of {steps} steps at "
                f"strength {strength:g}"
            )
            return None
        return schedule


def _steps_of(timesteps: tuple[int, ...] | None, count: int) -> int:
    """A number of steps whose grid holds the recorded `timesteps`; the released code's if they do not tell."""
    if timesteps is None or len(timesteps) < 2 or timesteps[0] <= timesteps[1]:
        return _STEPS
    stride = timesteps[0] - timesteps[1]
    train_steps = NoiseSchedule().train_steps
    return next((steps for steps in range(count, train_steps + 1) if train_steps // steps == stride), _STEPS)


def _training(tensors: Mapping[str, torch.Tensor], faults: list[str]) -> tuple[TrainingCase, ...]:
    """The cases of ``PREFIX_train``."""
    cases = []
    for case in sorted({name.split("_")[0] for name in tensors}):
        names = ("z", "noise", "t", "contexts", "loss", "grad", "grad_index")
        if missing := [f"{case}_{name}: missing" for name in names if f"{case}_{name}" not in tensors]:
            faults += missing
            continue
        z, noise, t, contexts, loss, grad, index = (tensors[f"{case}_{name}"] for name in names)
        contexts = contexts[:, 0] if contexts.ndim == 4 else contexts
        places = [int(place) for place in index.flatten()]
        if grad.numel() != len(places) * contexts[0].numel() or not all(0 <= k < len(contexts) for k in places):
            faults.append(
                f"{case}_grad: found {list(grad.shape)} at {places}; expected one of {list(contexts.shape[1:])} each"
            )
            continue
        gradient = torch.zeros_like(contexts)
        gradient[places] = grad.reshape(len(places), *contexts.shape[1:])
        z, noise = (tensor[None] if tensor.ndim == 3 else tensor for tensor in (z, noise))
        cases.append(TrainingCase(z, noise, int(t.flatten()[0]), contexts, float(loss.flatten()[0]), gradient))
    return tuple(cases)


def _path(prefix: Path, part: str) -> Path:
    return prefix.with_name(f"{prefix.name}_{part}.safetensors")


def _load(prefix: Path, part: str, faults: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, floating ones in float32, and metadata of one file."""
    path = _path(prefix, part)
    try:
        with safe_open(path, framework="pt") as file:
            says = dict(file.metadata() or {})
            raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except FileNotFoundError:
        faults.append(f"{path}: missing")
        return {}, {}
    except (OSError, SafetensorError) as error:
        faults.append(f"{path}: cannot be read ({error}); copy it again")
        return {}, {}
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in raw.items()}
    faults += [
        f"{path.name}: {name} holds NaN or infinite values"
        for name, tensor in tensors.items()
        if not torch.isfinite(tensor).all()
    ]
    return tensors, says
