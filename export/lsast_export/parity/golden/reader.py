"""Golden sets on disk: what LSAST's released code computed, as files ``PREFIX_….safetensors``.

====================== ==========================================================================================
``PREFIX_unet``        the U-Net in CompVis naming (``model.diffusion_model.*``)
``PREFIX_control``     its ControlNet (``control_model.*``)
``PREFIX_io``          one sampling run: z0, noise, hint, contexts [K, T, dim], unconditional [T, dim], then
                       start_latent, the n latents_in, eps_cond and eps_uncond of every step, the first step's
                       control_residual_00 …, final_latent
``PREFIX_train``       optional; for case i: i_z, i_noise, i_t, i_contexts, then i_loss, i_grad_index, i_grad
====================== ==========================================================================================

What the metadata says (steps, strength, guidance, num_heads …) may be missing in part; the weights, or the recorded
run, then say it. What was concluded in this way is noted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lsast_engines.diffusion.noise_schedule import NoiseSchedule
from lsast_engines.diffusion.timesteps import TimestepSchedule
from lsast_engines.errors import ExportError, UsageError, fault_list
from lsast_train.base.attention import GROUPS

from .golden_set import RESIDUAL, STAGES, GoldenSet, TrainingCase

_STEPS, _GUIDANCE = 50, 10.0
"""What the released code is called with (docs/method.md §4), for sets that say nothing."""


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
    training: dict[str, torch.Tensor] = {}
    if _path(prefix, "train").is_file():
        training, _ = _load(prefix, "train", faults)
    if faults:
        raise ExportError(fault_list(f"found no golden set {prefix}_…:", faults))
    reader = _Reader(tensors, {**unet_says, **control_says, **says}, faults)
    golden = reader.golden(prefix, unet, control, _training(training, faults))
    if faults or golden is None:
        raise ExportError(fault_list(f"{_path(prefix, 'io')} is not a golden set that can be run:", faults))
    return golden


class _Reader:
    """Tensors and metadata of ``PREFIX_io``; gathers faults and notes."""

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
        guidance = self._number("guidance", float)
        guided = self._has_null_half(guidance)
        needed = ["z0", "noise", "hint", "contexts", "start_latent", "latents_in", "eps_cond", "final_latent"]
        needed += ["unconditional", "eps_uncond"] if guided else []
        residuals = sorted(name for name in self.tensors if name.startswith(RESIDUAL))
        self.faults += [f"{name}: missing" for name in needed if name not in self.tensors]
        self.faults += [] if residuals else [f"{RESIDUAL}00 …: missing"]
        if self.faults:
            return None
        z0 = self._batched("z0", 4)
        size = tuple(z0.shape)
        contexts = self._contexts(size[0])
        stacked = {name: self._stacked(name, size) for name in ("latents_in", "eps_cond")}
        steps = stacked["latents_in"].shape[0]
        if guided:
            stacked["eps_uncond"] = self._stacked("eps_uncond", size)
        self.faults += [
            f"{name}: found {len(tensor)} steps; expected {steps}, as in latents_in"
            for name, tensor in stacked.items()
            if len(tensor) != steps
        ]
        single = {name: self._batched(name, 4, size) for name in ("noise", "start_latent", "final_latent")}
        hint = self._batched("hint", 4, (size[0], 3, 8 * size[2], 8 * size[3]))
        if guidance is None:
            guidance = _GUIDANCE if guided else 1.0
            self.notes.append(f"guidance: not in the metadata; {guidance:g} is taken")
        if not guided and guidance != 1:
            self.faults.append(f"eps_uncond: missing; expected with guidance {guidance:g}")
        recorded = self.tensors.get("timesteps")
        timesteps = None if recorded is None else tuple(int(t) for t in recorded.flatten())
        schedule = self._schedule(steps, timesteps)
        unconditional = self._unconditional(contexts) if guided else torch.zeros_like(contexts[0, 0])
        heads, head_channels = self._number("num_heads", int), self._number("num_head_channels", int)
        if self.faults or schedule is None:
            return None
        needed_contexts = max(step.stage for step in schedule.steps) + len(GROUPS)
        if len(contexts) < needed_contexts:
            self.faults.append(f"contexts: found {len(contexts)}; expected at least {needed_contexts} for these steps")
            return None
        return GoldenSet(
            prefix=prefix,
            unet=unet,
            control=control,
            heads=heads if heads and heads > 0 else None,
            head_channels=head_channels if head_channels and head_channels > 0 else None,
            guidance=guidance,
            schedule=schedule,
            z0=z0,
            noise=single["noise"],
            hint=hint,
            contexts=contexts,
            unconditional=unconditional,
            latents_in=stacked["latents_in"],
            eps_cond=stacked["eps_cond"],
            eps_uncond=stacked.get("eps_uncond"),
            sliced=guidance != 1,
            start_latent=single["start_latent"],
            final_latent=single["final_latent"],
            residuals=tuple(self.tensors[name] for name in residuals),
            timesteps=timesteps,
            training=training,
            architecture=self._architecture(),
            notes=tuple(self.notes),
        )

    def _has_null_half(self, guidance: float | None) -> bool:
        """Whether the set holds an unconditional half of its own; with guidance 1 a copy of the other is none."""
        null = self.tensors.get("eps_uncond")
        if null is None or null.numel() == 0:
            return False
        return guidance != 1 or "eps_cond" not in self.tensors or not torch.equal(null, self.tensors["eps_cond"])

    def _batched(self, name: str, axes: int, size: tuple[int, ...] | None = None) -> torch.Tensor:
        """A tensor with a batch axis, of `size`; one row serves a whole batch."""
        tensor = self.tensors[name]
        tensor = tensor[None] if tensor.ndim == axes - 1 else tensor
        if size is not None and tensor.ndim == axes and len(tensor) == 1:
            tensor = tensor.expand(size[0], *tensor.shape[1:])
        if tensor.ndim != axes or (size is not None and tensor.shape != size):
            expected = "[B, 4, h, w]" if size is None else list(size)
            self.faults.append(f"{name}: found shape {list(self.tensors[name].shape)}; expected {expected}")
            return torch.zeros(size or (1,) * axes)
        return tensor

    def _stacked(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        """[n, B, 4, h, w] of a tensor that may lack the batch axis, or have both in one."""
        tensor = self.tensors[name]
        if tensor.ndim < 4 or tuple(tensor.shape[-3:]) != size[1:] or tensor.numel() % math.prod(size):
            self.faults.append(f"{name}: found shape {list(tensor.shape)}; expected [n, {', '.join(map(str, size))}]")
            return torch.zeros(1, *size)
        return tensor.reshape(-1, *size)

    def _contexts(self, batch: int) -> torch.Tensor:
        """[K, B, T, dim]; one context serves a whole batch."""
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

    def _number(self, name: str, kind: type[int] | type[float]) -> Any:
        """A number of the metadata, None where it says nothing."""
        text = self.says.get(name)
        if text is None or text.strip().lower() in ("", "none", "null"):
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (kind is int and value != int(value)):
            self.faults.append(f"metadata {name}: found {text!r}; expected a {'whole ' * (kind is int)}number")
            return None
        return kind(value)

    def _schedule(self, count: int, timesteps: tuple[int, ...] | None) -> TimestepSchedule | None:
        """The run's schedule, which must have the recorded number of steps, `count`."""
        steps, strength = self._number("steps", int), self._number("strength", float)
        if steps is None:
            steps = _steps_of(timesteps, count)
            self.notes.append(f"steps: not in the metadata; {steps} fits the record")
        if strength is None:
            # Half a step more, so that the product is not rounded down to count - 1.
            strength = min((count + 0.5) / steps, 1.0)
            self.notes.append(f"strength: not in the metadata; {strength:g} fits the record")
        try:
            schedule = TimestepSchedule.build(NoiseSchedule(), steps, strength, STAGES, "released")
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

    def _architecture(self) -> dict[str, Any]:
        """What the metadata says of the networks, as far as it can be read."""
        found: dict[str, Any] = {}
        for name in ("model_channels", "num_res_blocks", "context_dim", "channel_mult"):
            try:
                found[name] = json.loads(self.says[name].replace("(", "[").replace(")", "]"))
            except (KeyError, ValueError):
                continue
        return found


def _steps_of(timesteps: tuple[int, ...] | None, count: int) -> int:
    """A number of steps whose grid holds the recorded `timesteps`; the released code's where they do not tell."""
    if timesteps is None or len(timesteps) < 2 or timesteps[0] <= timesteps[1]:
        return _STEPS
    stride = timesteps[0] - timesteps[1]
    train_steps = NoiseSchedule().train_steps
    fitting = [steps for steps in range(count, train_steps + 1) if train_steps // steps == stride]
    return fitting[0] if fitting else _STEPS


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
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            says = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - it is no dict
                tensor = file.get_tensor(name)
                tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    except FileNotFoundError:
        faults.append(f"{path}: missing")
        return {}, {}
    except (OSError, SafetensorError) as error:
        faults.append(f"{path}: cannot be read ({error}); copy it again")
        return {}, {}
    faults += [
        f"{path.name}: {name} holds NaN or infinite values"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    return tensors, says
