"""One step of a golden set: in torch, or by the exported graphs on a backend."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from safetensors.torch import save_file

from lsast_engines.backends.base import Engine
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.graph_spec import CONTROLNET_COND, DENOISER, GraphSpec, TensorSpec, graph_specs
from lsast_engines.errors import ExportError, fault_list
from lsast_train.base.attention import layer_contexts
from lsast_train.base.base import Base

from ...graphs.external_weights import save_graph
from ...graphs.modules import geometry, graph_module
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


def export_graphs(base: Base, folder: Path, progress: Progress) -> None:
    """Write the graphs ``controlnet_cond`` and ``denoiser`` of `base`, in float32, with their weights, to `folder`.

    Raises:
        ExportError: a graph that cannot be exported.
    """
    networks = {"unet": base.unet, "controlnet": base.controlnet}
    weights = {
        f"{prefix}.{key}": value.contiguous()
        for prefix, network in networks.items()
        for key, value in network.state_dict().items()
    }
    save_file(weights, folder / _WEIGHTS)
    widths = geometry(base)
    for name in (CONTROLNET_COND, DENOISER):
        progress(f"tracing {name}")
        with graph_module(base, name) as module:
            traced = trace(module, graph_specs(widths)[name], base.config.multiple, widths.factor)
        save_graph(traced, folder / _WEIGHTS, folder / f"{name}.onnx")


class EngineDenoiser:
    """The exported graphs on a backend, fed as the runtime's sampler does.

    Args:
        base: what was exported.
        golden: hint and contexts.
        folder: where `export_graphs` wrote to.
        backend: see `lsast_engines.backends.registry.open_engine`.

    Raises:
        BackendError, MissingExtraError: the backend is not installed or cannot load a graph.
    """

    def __init__(self, base: Base, golden: GoldenSet, folder: Path, backend: str) -> None:
        self._folder, self._backend = folder, backend
        self._specs = graph_specs(geometry(base))
        self._keys_values = _bake(base, golden)
        with closing(open_engine(folder / f"{CONTROLNET_COND}.onnx", self._specs[CONTROLNET_COND], backend)) as engine:
            self._hint = engine({"edges": np.ascontiguousarray(golden.hint.numpy())})["hint"].copy()
        self._engine = open_engine(folder / f"{DENOISER}.onnx", self._specs[DENOISER], backend)
        self._stage = self._bind(self._engine, 0)

    def residuals(self, latent: Array, timestep: int, stage: int) -> list[Array]:
        """See `Denoiser.residuals`."""
        path = self._folder / "probe.onnx"
        spec = _with_residuals(self._folder / f"{DENOISER}.onnx", path, self._specs[DENOISER])
        with closing(open_engine(path, spec, self._backend)) as engine:
            self._bind(engine, stage)
            outputs = engine(self._feeds(latent, timestep))
            names = [tensor.name for tensor in spec.outputs if tensor.name.startswith(RESIDUAL)]
            return [outputs[name].copy() for name in names]

    def eps(self, latent: Array, timestep: int, stage: int) -> Array:
        """See `Denoiser.eps`."""
        if stage != self._stage:
            self._stage = self._bind(self._engine, stage)
        return self._engine(self._feeds(latent, timestep))["eps"]

    def close(self) -> None:
        """Give the engine's memory back."""
        self._engine.close()

    def _bind(self, engine: Engine, stage: int) -> int:
        """Bind what stays the same within a stage; returns the stage."""
        kv_unet, kv_control = self._keys_values[stage]
        scale = np.array(1, np.float32)
        engine.bind_inputs({"hint": self._hint, "control_scale": scale, "kv_unet": kv_unet, "kv_control": kv_control})
        return stage

    def _feeds(self, latent: Array, timestep: int) -> dict[str, npt.NDArray[np.generic]]:
        return {"latent": np.ascontiguousarray(latent), "timestep": np.full(len(latent), timestep, np.int64)}


def _bake(base: Base, golden: GoldenSet) -> dict[int, tuple[Array, Array]]:
    """kv_unet [G, B, T, Wu] and kv_control [B, T, Wc] of every stage that the set visits."""
    project = KVProjector.of_base(base)
    found = {}
    for stage in sorted({step.stage for step in golden.schedule.steps} | {0}):
        halves = [project(contexts)[0].numpy() for contexts in golden.unet_contexts(stage)]
        found[stage] = np.stack(halves), project(golden.style_contexts(stage))[1].numpy()
    return found


def _with_residuals(source: Path, target: Path, spec: GraphSpec) -> GraphSpec:
    """Copy a denoiser's graph and make ControlNet's residuals its outputs too; returns the copy's spec.

    They are what the convolutions of ``controlnet_down_blocks`` and ``controlnet_mid_block`` give.

    Raises:
        ExportError: the graph has no such convolutions.
    """
    model = ir.load(source)
    ends: dict[str, ir.Value] = {}
    for node in model.graph:
        if node.op_type == "Conv" and (weight := node.inputs[1]) is not None and weight.name is not None:
            ends[weight.name] = node.outputs[0]
    names = [f"controlnet.controlnet_down_blocks.{index}.weight" for index in range(len(ends))]
    names = [*(name for name in names if name in ends), "controlnet.controlnet_mid_block.weight"]
    if missing := [f"{name}: no convolution takes it" for name in names if name not in ends]:
        raise ExportError(fault_list(f"{source.name} does not show ControlNet's residuals:", missing))
    outputs = []
    for index, name in enumerate(names):
        value = ends[name]
        value.name = f"{RESIDUAL}{index:02}"
        value.type = ir.TensorType(ir.DataType.FLOAT)
        shape = ("B", f"C{index}", f"h{index}", f"w{index}")
        value.shape = ir.Shape(shape)
        model.graph.outputs.append(value)
        outputs.append(TensorSpec(value.name, "float32", shape))
    ir.save(model, target)
    return dataclasses.replace(spec, outputs=(*spec.outputs, *outputs))
