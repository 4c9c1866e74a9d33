"""One step of a golden set: in torch, or with the exported graphs on a backend."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from safetensors.torch import save_file

from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.graph_spec import (
    CONTROLNET,
    CONTROLNET_COND,
    DENOISER,
    TensorSpec,
    graph_specs,
    split_specs,
)
from lsast_train.base.attention import layer_contexts
from lsast_train.base.base import Base

from ...graphs.external_weights import save_graph
from ...graphs.modules import geometry, graph_module, unet_split
from ...graphs.trace import trace
from ...progress import Progress
from ...styles.bake import KVProjector
from .golden_set import RESIDUAL, GoldenSet

Array = npt.NDArray[np.float32]

_WEIGHTS = "base.safetensors"


class Denoiser(Protocol):
    """Computes one step of a golden set. Rows of eps: [unconditional, conditional], or one without guidance."""

    def residuals(self, latent: Array, timestep: int, stage: int) -> list[Array]:
        """ControlNet's residuals at `latent` [B, 4, h, w], in the order of the set."""

    def eps(self, latent: Array, timestep: int, stage: int) -> Array:
        """[G, B, 4, h, w] at `latent` [B, 4, h, w]; the next call may overwrite it."""


class TorchDenoiser:
    """The base in torch: ControlNet once, on the conditional contexts, its residuals shared by both halves."""

    def __init__(self, base: Base, golden: GoldenSet) -> None:
        self._base, self._golden = base, golden

    def residuals(self, latent: Array, timestep: int, stage: int) -> list[Array]:
        """See `Denoiser.residuals`."""
        return [residual.numpy() for residual in self._control(torch.from_numpy(latent), timestep, stage)]

    def eps(self, latent: Array, timestep: int, stage: int) -> Array:
        """See `Denoiser.eps`."""
        x = torch.from_numpy(latent)
        contexts = self._golden.unet_contexts(stage)
        rows = len(contexts)
        *down, middle = (residual.repeat(rows, 1, 1, 1) for residual in self._control(x, timestep, stage))
        output = self._base.unet(
            x.repeat(rows, 1, 1, 1),
            timestep,
            None,
            cross_attention_kwargs=layer_contexts(torch.cat(contexts)),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        eps: Array = output.unflatten(0, (rows, len(x))).numpy()
        return eps

    def _control(self, latent: torch.Tensor, timestep: int, stage: int) -> list[torch.Tensor]:
        kwargs = layer_contexts(self._golden.style_contexts(stage))
        down, middle = self._base.controlnet(
            latent, timestep, None, self._golden.hint, cross_attention_kwargs=kwargs, return_dict=False
        )
        return [*down, middle]


class EngineDenoiser:
    """The exported graphs on a backend, fed as the runtime's sampler feeds them.

    Args:
        base: what was exported.
        golden: hint and contexts.
        folder: of `export_graphs`.
        backend: see `lsast_engines.backends.registry.open_engine`.

    Raises:
        BackendError, MissingExtraError: the backend is not installed or cannot load a graph.
    """

    def __init__(self, base: Base, golden: GoldenSet, folder: Path, backend: str) -> None:
        self._golden = golden
        self._project = KVProjector.of_base(base)
        specs = graph_specs(geometry(base))
        with closing(open_engine(folder / f"{CONTROLNET_COND}.onnx", specs[CONTROLNET_COND], backend)) as engine:
            hint = engine({"edges": np.ascontiguousarray(golden.hint.numpy())})["hint"].copy()
        self._constants: dict[str, npt.NDArray[Any]] = {"hint": hint, "control_scale": np.array(1, np.float32)}
        spec = dataclasses.replace(specs[DENOISER], outputs=(*specs[DENOISER].outputs, *_residual_specs(base)))
        self._engine = open_engine(folder / f"{DENOISER}.onnx", spec, backend)
        self._stage = -1

    def residuals(self, latent: Array, timestep: int, stage: int) -> list[Array]:
        """See `Denoiser.residuals`."""
        outputs = self._run(latent, timestep, stage)
        return [outputs[name].copy() for name in sorted(outputs) if name.startswith(RESIDUAL)]

    def eps(self, latent: Array, timestep: int, stage: int) -> Array:
        """See `Denoiser.eps`."""
        return self._run(latent, timestep, stage)["eps"]

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()

    def _run(self, latent: Array, timestep: int, stage: int) -> dict[str, Array]:
        if stage != self._stage:
            halves = [self._project(contexts)[0].numpy() for contexts in self._golden.unet_contexts(stage)]
            kv_control = self._project(self._golden.style_contexts(stage))[1].numpy()
            self._engine.bind_inputs({**self._constants, "kv_unet": np.stack(halves), "kv_control": kv_control})
            self._stage = stage
        timesteps = np.full(len(latent), timestep, np.int64)
        return dict(self._engine({"latent": np.ascontiguousarray(latent), "timestep": timesteps}))


def export_graphs(base: Base, folder: Path, progress: Progress) -> None:
    """Write the graphs ``controlnet_cond`` and ``denoiser`` of `base`, in float32, with their weights, to `folder`.

    The residuals, which the convolutions of ``controlnet_down_blocks`` and ``controlnet_mid_block`` compute, become
    further outputs of the denoiser; nothing else is changed.

    Raises:
        ExportError: a graph that cannot be exported.
    """
    weights = {
        f"{prefix}.{key}": value.contiguous()
        for prefix in ("unet", "controlnet")
        for key, value in base.networks()[prefix].state_dict().items()
    }
    save_file(weights, folder / _WEIGHTS)
    widths = geometry(base)
    for name in (CONTROLNET_COND, DENOISER):
        progress(f"tracing {name}")
        with graph_module(base, name) as module:
            traced = trace(module, graph_specs(widths)[name], base.config.multiple, widths.factor)
        save_graph(traced, folder / _WEIGHTS, folder / f"{name}.onnx")
    path, residuals = folder / f"{DENOISER}.onnx", _residual_specs(base)
    model = ir.load(path)
    results = {str(node.inputs[1].name): node.outputs[0] for node in model.graph if node.op_type == "Conv"}  # type: ignore[union-attr]
    layers = [*(f"controlnet_down_blocks.{index}" for index in range(len(residuals) - 1)), "controlnet_mid_block"]
    for layer, tensor in zip(layers, residuals, strict=True):
        value = results[f"controlnet.{layer}.weight"]
        value.name, value.type, value.shape = tensor.name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(tensor.shape)
        model.graph.outputs.append(value)
    ir.save(model, path)


def _residual_specs(base: Base) -> list[TensorSpec]:
    residuals = split_specs(geometry(base), unet_split(base))[CONTROLNET].outputs
    return [dataclasses.replace(tensor, name=f"{RESIDUAL}{place:02}") for place, tensor in enumerate(residuals)]
