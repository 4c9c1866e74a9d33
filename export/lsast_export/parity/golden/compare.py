"""Proof against the released code: repeats a golden set in torch, or with the exported graphs on a backend.

Both run what the runtime runs: `TimestepSchedule` and the solver ``ddim_lsast``. In torch the denoiser is the base as
it is trained, contexts projected inside each attention; on a backend it is the exported ``controlnet_cond`` and
``denoiser`` graphs with baked keys and values, fed as `lsast.sampling.sampler.sample` feeds them. Keys and values stay
float32 here; style files hold float16. The residuals are those of the graph ``controlnet``.

Every step is computed twice: from the recorded latent, and (``free_…``) from the latent that our own run has reached.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lsast_engines.backends.registry import require_backend
from lsast_engines.diffusion import guide, make_solver
from lsast_engines.errors import ExportError, fault_list
from lsast_train.base.base import Base, BaseConfig, build_base
from lsast_train.checkpoints.compvis import UNET, controlnet_weights, section, unet_weights
from lsast_train.evaluation import noise_error
from lsast_train.prompts.prompt_space import PromptSpace

from ...progress import Progress, no_progress
from ..parity import relative_error
from .denoisers import Array, Denoiser, EngineDenoiser, TorchDenoiser, export_graphs
from .golden_set import RESIDUAL, STAGES, GoldenSet

TORCH = "torch"
"""The backend that is the base itself, in float32."""


@dataclass(frozen=True)
class GoldenReport:
    """How far a backend is from a golden set."""

    prefix: Path
    backend: str
    tolerance: float
    errors: dict[str, float]
    """By quantity the largest difference relative to the largest magnitude recorded; of eps and latents at the worst
    step, each step relative to itself."""
    architecture: dict[str, object]
    """The networks: the widths of their weights, and their heads."""
    notes: tuple[str, ...]
    """What was not compared."""
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())


def check_golden(
    golden: GoldenSet, backend: str = TORCH, tolerance: float = 1e-4, progress: Progress = no_progress
) -> GoldenReport:
    """Run `golden` on `backend` and compare.

    Args:
        golden: the set.
        backend: `TORCH`, or one of `lsast_engines.backends.registry.EXTRAS`.
        tolerance: largest error that passes.
        progress: is called at each phase.

    Raises:
        TrainingError: networks whose architecture cannot be read from their weights.
        ExportError: networks that do not fit the inputs; a graph that cannot be exported.
        BackendError, MissingExtraError: the backend is not installed or cannot run the graphs.
        ParityError: results that are not finite.
    """
    begin = time.perf_counter()
    if backend != TORCH:
        require_backend(backend)
    progress("building the networks")
    base, architecture = golden_base(golden)
    notes: tuple[str, ...] = ()
    errors: dict[str, float] = {}
    with torch.no_grad(), ExitStack() as stack:
        if backend == TORCH:
            denoiser: Denoiser = TorchDenoiser(base, golden)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lsast-golden.")))
            export_graphs(base, folder, progress)
            denoiser = stack.enter_context(closing(EngineDenoiser(base, golden, folder, backend)))
        progress(f"sampling with {backend}")
        for name, error in _sampling_errors(golden, denoiser):
            errors[name] = max(errors.get(name, 0.0), error)
    if golden.training and backend == TORCH:
        progress("training steps")
        errors |= _training_errors(base, golden)
    elif golden.training:
        notes = (f"training: not compared on {backend}; nothing is trained there",)
    return GoldenReport(golden.prefix, backend, tolerance, errors, architecture, notes, time.perf_counter() - begin)


def golden_base(golden: GoldenSet) -> tuple[Base, dict[str, object]]:
    """The base of a golden set (without an autoencoder), and its architecture.

    Raises:
        TrainingError: weights that are no U-Net or ControlNet.
        ExportError: networks that do not fit one another or the inputs; all faults at once.
    """
    unet = unet_weights(golden.unet, heads=golden.heads).build()
    controlnet = controlnet_weights(golden.control, heads=golden.heads).build()
    widths = [int(width) for width in unet.config.block_out_channels]
    channels = int(section(golden.unet, UNET)["input_blocks.0.0.weight"].shape[0])
    architecture: dict[str, object] = {
        "model_channels": channels,
        "channel_mult": [width // channels for width in widths],
        "num_res_blocks": int(unet.config.layers_per_block),
        "context_dim": int(unet.config.cross_attention_dim),
        "num_heads": golden.heads,
    }
    cells = 2 ** (len(widths) - 1)
    faults = [
        f"ControlNet: found {name} {controlnet.config[name]}; expected {unet.config[name]}"
        for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels")
        if unet.config[name] != controlnet.config[name]
    ]
    if golden.contexts.shape[2] != unet.config.cross_attention_dim:
        faults.append(f"contexts: found {golden.contexts.shape[2]} channels; expected {architecture['context_dim']}")
    if golden.z0.shape[1] != unet.config.in_channels:
        faults.append(f"z0: found {golden.z0.shape[1]} channels; expected {unet.config.in_channels}")
    if any(side % cells for side in golden.z0.shape[2:]):
        faults.append(f"z0: found {list(golden.z0.shape[2:])} cells; expected multiples of {cells}")
    expected = len(controlnet.controlnet_down_blocks) + 1
    if len(golden.residuals) != expected:
        faults.append(f"{RESIDUAL}…: found {len(golden.residuals)}; expected {expected}")
    if faults:
        raise ExportError(fault_list(f"the networks of {golden.prefix} do not fit its record:", faults))
    config = BaseConfig(
        name=golden.prefix.name,
        family="sd15",
        prediction="epsilon",
        tokens=int(golden.contexts.shape[1]),
        size=64,
        latent_scale=0.18215,
        noise=golden.schedule.noise,
        multiple=8 * cells,
    )
    base = build_base(config, "0" * 64, unet, controlnet, nn.Identity(), golden.unconditional)
    return base, architecture


def _sampling_errors(golden: GoldenSet, denoiser: Denoiser) -> Iterator[tuple[str, float]]:
    """Name and error of every comparison, steps one after another."""
    schedule = golden.schedule
    solver = make_solver(schedule)
    yield "timesteps", _error("timesteps", [step.t for step in schedule.steps], golden.timesteps)
    x = schedule.add_noise(golden.z0.numpy(), golden.noise.numpy())
    yield "start_latent", _error("start_latent", x, golden.start_latent)
    first = schedule.steps[0]
    yield from _residual_errors(denoiser.residuals(golden.latents_in[0].numpy(), first.t, first.stage), golden)
    for step in schedule.steps:
        recorded = golden.latents_in[step.index]
        rows = {"eps_cond": golden.eps_cond[step.index]}
        if golden.eps_uncond is not None:
            rows = {"eps_uncond": golden.eps_uncond[step.index], **rows}
        forced = denoiser.eps(recorded.numpy(), step.t, step.stage).copy()
        yield from ((name, _error(name, forced[row], rows[name])) for row, name in enumerate(rows))
        yield "free_latents", _error("free_latents", x, recorded)
        free = denoiser.eps(x, step.t, step.stage)
        yield from ((f"free_{name}", _error(f"free_{name}", free[row], rows[name])) for row, name in enumerate(rows))
        x = solver.step(guide(free, golden.guidance), step.index, x)
    yield "final_latent", _error("final_latent", x, golden.final_latent)


def _training_errors(base: Base, golden: GoldenSet) -> dict[str, float]:
    """Our training step on the recorded contexts: gradient by the decoder only, matrix s + l (docs/method.md §3)."""
    errors: dict[str, float] = {}
    for case in golden.training:
        space = PromptSpace(case.contexts[0], "step+layer", "direct", "overlap", "decoder", stages=STAGES)
        count = len(space.matrices)
        if case.contexts.shape[1:] != space.matrices.shape[1:] or len(case.contexts) < count:
            raise ExportError(
                f"found training contexts of shape {list(case.contexts.shape)}; expected at least {count} of them"
            )
        space.matrices.data = case.contexts[:count].clone()
        timestep = torch.tensor([case.timestep] * len(case.latents))
        loss = noise_error(base, space, case.latents, case.noise, timestep, "no").mean()
        (gradient,) = torch.autograd.grad(loss, space.matrices)
        elsewhere = case.gradient.flatten(1).abs().amax(1) == 0
        found = torch.zeros_like(case.gradient)
        found[:count] = gradient
        peak = float(case.gradient.abs().max()) or 1.0
        for name, error in (
            ("train_loss", _error("train_loss", loss.detach(), torch.tensor(case.loss))),
            ("train_gradient", _error("train_gradient", found, case.gradient)),
            ("train_gradient_elsewhere", float(found[elsewhere].abs().amax()) / peak if elsewhere.any() else 0.0),
        ):
            errors[name] = max(errors.get(name, 0.0), error)
    return errors


def _residual_errors(found: list[Array], golden: GoldenSet) -> Iterator[tuple[str, float]]:
    for index, (ours, theirs) in enumerate(zip(found, golden.residuals, strict=True)):
        name = f"{RESIDUAL}{index:02}"
        yield name, _error(name, ours, theirs)


def _error(name: str, found: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    return relative_error(np.asarray(found, np.float64), np.asarray(expected, np.float64), name)
