"""Proof against the released code: a golden set run again here, in torch or as exported graphs on a backend.

Both sides share what the runtime runs: `TimestepSchedule` and the solver ``released``. In torch the denoiser is the
base as it is trained, contexts projected inside each attention; on a backend it is the exported ``controlnet_cond`` and
``denoiser`` graphs fed with baked keys and values, as `lsast.sampling.sampler.denoise` feeds them. Keys and values stay
float32 here, style files hold halves. The residuals, which the denoiser keeps to itself, are
read off a copy of its graph that has them as further outputs and is otherwise the same.

Every step is computed twice: from the recorded latent, and (``free_…``) from the latent that our own run has reached.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from lsast_engines.diffusion.guidance import guide
from lsast_engines.diffusion.solvers import make_solver
from lsast_engines.errors import ExportError, ParityError, fault_list
from lsast_train.base.base import Base, BaseFacts
from lsast_train.checkpoints.compvis import HEADS, UNET, controlnet_from_compvis, section, unet_from_compvis
from lsast_train.evaluation import noise_error
from lsast_train.prompts.prompt_space import PromptSpace

from ...bundle.export import require_backend
from .denoisers import Denoiser, EngineDenoiser, TorchDenoiser, export_graphs
from .golden_set import RESIDUAL, STAGES, GoldenSet

Array = npt.NDArray[np.float32]
Progress = Callable[[str], None]
"""Told the name of each phase as it begins."""

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
    """The networks: what the weights say, and the heads."""
    notes: tuple[str, ...]
    """What was concluded where the set says nothing, and what was not compared."""
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())


def check_golden(
    golden: GoldenSet, backend: str = TORCH, tolerance: float = 1e-4, progress: Progress = lambda phase: None
) -> GoldenReport:
    """Run `golden` on `backend` and compare.

    Args:
        golden: the set.
        backend: `TORCH`, or one of `lsast_engines.backends.base.EXTRAS`.
        tolerance: largest error that passes.
        progress: told each phase.

    Raises:
        TrainingError: networks whose architecture cannot be read from their weights.
        ExportError: networks that do not fit the inputs or the metadata; a graph that cannot be exported.
        BackendError, MissingExtraError: the backend is not there or cannot run the graphs.
        ParityError: results that are not finite.
    """
    begin = time.perf_counter()
    if backend != TORCH:
        require_backend(backend)
    progress("building the networks")
    base, architecture, notes = golden_base(golden)
    if golden.guidance == 1:
        golden, note = _settle_contexts(base, golden)
        notes = (*notes, note)
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
        notes = (*notes, f"training: not compared on {backend}; nothing is trained there")
    return GoldenReport(golden.prefix, backend, tolerance, errors, architecture, notes, time.perf_counter() - begin)


def golden_base(golden: GoldenSet) -> tuple[Base, dict[str, object], tuple[str, ...]]:
    """The base of a golden set (without an autoencoder), what it is, and the set's notes with our own.

    Raises:
        TrainingError: weights that are no U-Net or ControlNet.
        ExportError: networks that do not fit one another, the inputs or the metadata; all faults at once.
    """
    # Built with one head, which divides everything; the heads are set below, where they may have to be found out.
    unet = unet_from_compvis(golden.unet, heads=golden.heads or 1)
    controlnet = controlnet_from_compvis(golden.control, heads=golden.heads or 1)
    widths = [int(width) for width in unet.config.block_out_channels]
    channels = int(section(golden.unet, UNET)["input_blocks.0.0.weight"].shape[0])
    architecture: dict[str, object] = {
        "model_channels": channels,
        "channel_mult": [width // channels for width in widths],
        "num_res_blocks": int(unet.config.layers_per_block),
        "context_dim": int(unet.config.cross_attention_dim),
    }
    cells = 2 ** (len(widths) - 1)
    faults = [
        f"metadata {name}: found {golden.architecture[name]}; expected {found}, as in the weights"
        for name, found in architecture.items()
        if name in golden.architecture and golden.architecture[name] != found
    ]
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels"):
        if unet.config[name] != controlnet.config[name]:
            faults.append(f"ControlNet: found {name} {controlnet.config[name]}; expected {unet.config[name]}")
    if golden.contexts.shape[3] != unet.config.cross_attention_dim:
        faults.append(f"contexts: found {golden.contexts.shape[3]} channels; expected {architecture['context_dim']}")
    if golden.z0.shape[1] != unet.config.in_channels:
        faults.append(f"z0: found {golden.z0.shape[1]} channels; expected {unet.config.in_channels}")
    if any(side % cells for side in golden.z0.shape[2:]):
        faults.append(f"z0: found {list(golden.z0.shape[2:])} cells; expected multiples of {cells}")
    expected = len(controlnet.controlnet_down_blocks) + 1
    if len(golden.residuals) != expected:
        faults.append(f"{RESIDUAL}…: found {len(golden.residuals)}; expected {expected}")
    if faults:
        raise ExportError(fault_list(f"the networks of {golden.prefix} do not fit its record:", faults))
    facts = BaseFacts(
        name=golden.prefix.name,
        family="sd15",
        prediction="epsilon",
        tokens=int(golden.contexts.shape[2]),
        size=64,
        latent_scale=0.18215,
        noise=golden.schedule.noise,
        multiple=8 * cells,
    )
    base = Base(facts, "0" * 64, unet, controlnet, nn.Identity(), golden.unconditional)
    heads, note = _settle_heads(base, golden)
    return base, {**architecture, **heads}, (*golden.notes, *note)


def _settle_heads(base: Base, golden: GoldenSet) -> tuple[dict[str, object], tuple[str, ...]]:
    """Give every attention its heads. Weights cannot tell; a set that does not either shows it in its residuals."""
    networks = (base.unet, base.controlnet)
    widths = [int(width) for width in base.unet.config.block_out_channels]
    if golden.heads is not None:
        return {"num_heads": golden.heads}, ()
    if (each := golden.head_channels) is not None:
        _set_heads(networks, {width: max(1, width // each) for width in widths})
        return {"num_head_channels": each}, ()
    denoiser = TorchDenoiser(base, golden)
    first = golden.schedule.steps[0]
    errors: dict[int, float] = {}
    with torch.no_grad():
        for heads in (count for count in range(1, min(widths) + 1) if not any(width % count for width in widths)):
            _set_heads(networks, dict.fromkeys(widths, heads))
            found = denoiser.residuals(golden.latents_in[0].numpy(), first.t, first.stage)
            errors[heads] = max(_pair_errors(found, golden.residuals))
    chosen = min(errors, key=lambda heads: (errors[heads], heads != HEADS))
    _set_heads(networks, dict.fromkeys(widths, chosen))
    return {"num_heads": chosen}, (f"num_heads: not in the metadata; {chosen} fits the recorded residuals best",)


def _settle_contexts(base: Base, golden: GoldenSet) -> tuple[GoldenSet, str]:
    """Whether an unguided run's U-Net saw each stage's contexts: not in the released code, see `GoldenSet.sliced`."""
    first = golden.schedule.steps[0]
    errors = {}
    for sliced in (False, True):
        denoiser = TorchDenoiser(base, dataclasses.replace(golden, sliced=sliced))
        with torch.no_grad():
            found = denoiser.eps(golden.latents_in[0].numpy(), first.t, first.stage)[-1]
        errors[sliced] = _error("eps_cond", found, golden.eps_cond[0])
    sliced = errors[True] < errors[False]
    kind = "those of each stage, unlike in the released code" if sliced else "0, 1 and 2 at every step, as released"
    return dataclasses.replace(golden, sliced=sliced), f"the U-Net's contexts with guidance 1: {kind}"


def _set_heads(networks: tuple[nn.Module, ...], heads: Mapping[int, int]) -> None:
    """Divide every attention of `networks` into as many heads as `heads` says for its width."""
    for network in networks:
        for module in network.modules():
            if isinstance(module, Attention):
                width = int(module.to_q.out_features)
                module.heads = heads[width]
                module.scale = (width // module.heads) ** -0.5


def _sampling_errors(golden: GoldenSet, denoiser: Denoiser) -> Iterator[tuple[str, float]]:
    """Name and error of every comparison, steps one after another."""
    schedule = golden.schedule
    solver = make_solver(schedule.solver, schedule.noise, schedule)
    if golden.timesteps is not None:
        found = np.array([step.t for step in schedule.steps])
        yield "timesteps", _error("timesteps", found, np.array(golden.timesteps).reshape(-1))
    x = schedule.add_noise(golden.z0.numpy(), golden.noise.numpy(), schedule.start_t)
    yield "start_latent", _error("start_latent", x, golden.start_latent)
    first = schedule.steps[0]
    residuals = denoiser.residuals(golden.latents_in[0].numpy(), first.t, first.stage)
    for index, error in enumerate(_pair_errors(residuals, golden.residuals)):
        yield f"{RESIDUAL}{index:02}", error
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
        eps = guide(free, golden.guidance)
        x = solver.step(eps, step.index, x)
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
        loss = noise_error(base, space, case.latents, case.noise, timestep, "fp32").mean()
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


def _pair_errors(found: list[Array], expected: tuple[torch.Tensor, ...]) -> list[float]:
    return [
        _error(f"{RESIDUAL}{index:02}", ours, theirs)
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True))
    ]


def _error(name: str, found: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """max|found - expected| / max|expected| (absolute where that is 0)."""
    ours, theirs = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if ours.shape != theirs.shape and ours.size == theirs.size:
        theirs = theirs.reshape(ours.shape)
    if ours.shape != theirs.shape:
        raise ParityError(f"{name}: found shape {list(ours.shape)}; expected {list(theirs.shape)}, as recorded")
    if not np.isfinite(ours).all():
        raise ParityError(f"{name}: found NaN or infinite values; expected finite ones")
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))


def failures(errors: Mapping[str, float], tolerance: float) -> list[str]:
    """What is past the tolerance, a line each."""
    return [
        f"{name}: found a relative error of {error:.2e}; expected at most {tolerance:.0e}"
        for name, error in errors.items()
        if not error <= tolerance
    ]
