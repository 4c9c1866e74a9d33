"""Golden sets: what LSAST's released code computed, as files ``PREFIX_….safetensors``.

====================== ==========================================================================================
``PREFIX_unet``        the U-Net in CompVis naming (``model.diffusion_model.*``)
``PREFIX_control``     its ControlNet (``control_model.*``)
``PREFIX_io``          one sampling run of B pictures in n steps: z0, noise, hint, contexts [K, T, dim], unconditional
                       [T, dim], then timesteps [n], start_latent, latents_in, eps_cond and eps_uncond [n·B, 4, h, w]
                       of every step, the first step's control_residual_00 …, final_latent; in the metadata steps,
                       strength, guidance and num_heads
``PREFIX_train``       optional; for case i: i_z, i_noise, i_t, i_contexts, then i_loss, i_grad_index, i_grad
====================== ==========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lsast_engines.diffusion import NoiseSchedule, TimestepSchedule
from lsast_engines.errors import ExportError, UsageError, fault_list
from lsast_train.base.attention import GROUPS

STAGES = 10
"""Stages of the released code."""

RESIDUAL = "control_residual_"
"""Prefix of the names of ControlNet's residuals, in the order of the input blocks, the middle last."""


@dataclass(frozen=True, eq=False)
class TrainingCase:
    """One training step of the released code."""

    latents: torch.Tensor
    """Clean latents [B, 4, h, w]."""
    noise: torch.Tensor
    timestep: int
    contexts: torch.Tensor
    """[K, T, dim]."""
    loss: float
    gradient: torch.Tensor
    """Of the loss to the contexts, [K, T, dim]: zero but for those that the set names."""


@dataclass(frozen=True, eq=False)
class GoldenSet:
    """A golden set in memory, float32; B pictures, n steps."""

    prefix: Path
    unet: dict[str, torch.Tensor]
    control: dict[str, torch.Tensor]
    heads: int
    """Attention heads of every layer."""
    guidance: float
    schedule: TimestepSchedule
    z0: torch.Tensor
    """[B, 4, h, w], as `noise`."""
    noise: torch.Tensor
    hint: torch.Tensor
    """[B, 3, 8h, 8w]."""
    contexts: torch.Tensor
    """[K, T, dim]."""
    unconditional: torch.Tensor
    """[T, dim]."""
    timesteps: tuple[int, ...]
    latents_in: torch.Tensor
    """[n, B, 4, h, w], as both eps."""
    eps_cond: torch.Tensor
    eps_uncond: torch.Tensor | None
    """None at guidance 1, where the unconditional half is not computed."""
    start_latent: torch.Tensor
    """[B, 4, h, w], as `final_latent`."""
    final_latent: torch.Tensor
    residuals: tuple[torch.Tensor, ...]
    training: tuple[TrainingCase, ...]

    def style_contexts(self, stage: int) -> torch.Tensor:
        """The style's contexts of one stage, [B, 3, T, dim]: number s + l for layer group l (docs/method.md §1.4)."""
        return self.contexts[stage : stage + len(GROUPS)].expand(len(self.z0), -1, -1, -1)

    def unet_contexts(self, stage: int) -> list[torch.Tensor]:
        """The U-Net's contexts [B, 3, T, dim] of one stage, for each guidance half: [unconditional,] conditional.

        At guidance 1 the released code passes all contexts unsliced, so that 0, 1 and 2 serve every stage of the
        U-Net, but not of ControlNet (docs/method.md §8.6).
        """
        style = self.style_contexts(0 if self.guidance == 1 else stage)
        return [style] if self.eps_uncond is None else [self.unconditional.expand_as(style), style]


def read_golden(prefix: Path) -> GoldenSet:
    """Read the files of a golden set.

    Raises:
        ExportError: files, tensors or metadata that are missing, of other shapes or values, or not finite; all faults
            at once.
    """
    faults: list[str] = []
    (unet, _), (control, _), (tensors, metadata) = (_load(prefix, part, faults) for part in ("unet", "control", "io"))
    train = _load(prefix, "train", faults)[0] if _path(prefix, "train").is_file() else {}
    if faults:
        raise ExportError(fault_list(f"found no golden set {prefix}_…:", faults))
    numbers = {name: _number(metadata, name, faults) for name in ("steps", "strength", "guidance", "num_heads")}
    guided = ["unconditional", "eps_uncond"] if numbers["guidance"] != 1 else []
    single = ["z0", "noise", "start_latent", "final_latent"]
    stacked = ["latents_in", "eps_cond", *guided[1:]]
    needed = [*single, *stacked, "hint", "contexts", "timesteps", *guided[:1]]
    faults += [f"{name}: missing" for name in needed if name not in tensors]
    residuals = sorted(name for name in tensors if name.startswith(RESIDUAL))
    faults += [] if residuals else [f"{RESIDUAL}00 …: missing"]
    schedule = None if faults else _schedule(numbers, faults)
    if schedule is not None:
        batch, channels, height, width = size = tuple(tensors["z0"].shape)
        tokens_and_dim = tuple(tensors["contexts"].shape[1:])
        expected = {
            **dict.fromkeys(single, size),
            **dict.fromkeys(stacked, (len(schedule.steps) * batch, channels, height, width)),
            "hint": (batch, 3, 8 * height, 8 * width),
            "contexts": (max(len(tensors["contexts"]), schedule.steps[0].stage + len(GROUPS)), *tokens_and_dim),
            "timesteps": (len(schedule.steps),),
            **dict.fromkeys(guided[:1], tokens_and_dim),
        }
        faults += [
            f"{name}: found shape {list(tensors[name].shape)}; expected {list(shape)}"
            for name, shape in expected.items()
            if tuple(tensors[name].shape) != shape
        ]
    training = _training(train, faults)
    if faults or schedule is None:
        raise ExportError(fault_list(f"{_path(prefix, 'io')} is not a golden set that can be run:", faults))
    return GoldenSet(
        prefix=prefix,
        unet=unet,
        control=control,
        heads=int(numbers["num_heads"]),
        guidance=numbers["guidance"],
        schedule=schedule,
        **{name: tensors[name] for name in single},
        hint=tensors["hint"],
        contexts=tensors["contexts"],
        unconditional=tensors.get("unconditional", torch.zeros_like(tensors["contexts"][0])),
        timesteps=tuple(int(t) for t in tensors["timesteps"]),
        latents_in=tensors["latents_in"].unflatten(0, (-1, batch)),
        eps_cond=tensors["eps_cond"].unflatten(0, (-1, batch)),
        eps_uncond=tensors["eps_uncond"].unflatten(0, (-1, batch)) if guided else None,
        residuals=tuple(tensors[name] for name in residuals),
        training=training,
    )


def _number(metadata: Mapping[str, str], name: str, faults: list[str]) -> float:
    """A number of the metadata; whole for steps and heads."""
    try:
        value = float(metadata.get(name, "nothing"))
    except ValueError:
        value = math.nan
    whole = name in ("steps", "num_heads")
    if not math.isfinite(value) or (whole and (value != int(value) or value < 1)):
        faults.append(f"metadata {name}: found {metadata.get(name)!r}; expected a {'whole ' * whole}number")
    return value


def _schedule(numbers: Mapping[str, float], faults: list[str]) -> TimestepSchedule | None:
    try:
        return TimestepSchedule.build(NoiseSchedule(), int(numbers["steps"]), numbers["strength"], STAGES, "ddim_lsast")
    except UsageError as error:
        faults.append(f"metadata: {error}")
        return None


def _training(tensors: Mapping[str, torch.Tensor], faults: list[str]) -> tuple[TrainingCase, ...]:
    """The cases of ``PREFIX_train``."""
    cases = []
    for case in sorted({name.split("_")[0] for name in tensors}):
        names = ("z", "noise", "t", "contexts", "loss", "grad", "grad_index")
        if missing := [f"{case}_{name}: missing" for name in names if f"{case}_{name}" not in tensors]:
            faults += missing
            continue
        z, noise, t, contexts, loss, grad, index = (tensors[f"{case}_{name}"] for name in names)
        places = [int(place) for place in index]
        if grad.numel() != len(places) * contexts[0].numel() or not all(0 <= k < len(contexts) for k in places):
            faults.append(
                f"{case}_grad: found {list(grad.shape)} at {places}; expected one of {list(contexts.shape[1:])} each"
            )
            continue
        gradient = torch.zeros_like(contexts)
        gradient[places] = grad.reshape(len(places), *contexts.shape[1:])
        cases.append(TrainingCase(z, noise, int(t), contexts, float(loss), gradient))
    return tuple(cases)


def _path(prefix: Path, part: str) -> Path:
    return prefix.with_name(f"{prefix.name}_{part}.safetensors")


def _load(prefix: Path, part: str, faults: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, floating ones in float32, and metadata of one file."""
    path = _path(prefix, part)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
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
    return tensors, metadata
