"""One step of a golden set: in torch, or with the exported graphs on a backend."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from lsast_engines.backends.base import Engine
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.graph_spec import (
    CONTROLNET,
    CONTROLNET_COND,
    DENOISER,
    graph_specs,
    split_specs,
)
from lsast_train.base.attention import layer_contexts
from lsast_train.base.base import Base

from ...graphs.external_weights import save_graph
from ...graphs.modules import geometry, unet_split
from ...graphs.trace import trace_graphs
from ...progress import Progress
from ...styles.bake import KVProjector
from .golden_set import GoldenSet

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
        widths = geometry(base)
        specs = graph_specs(widths) | split_specs(widths, unet_split(base))

        def opened(name: str) -> Engine:
            return open_engine(folder / f"{name}.onnx", specs[name], backend)

        with closing(opened(CONTROLNET_COND)) as engine:
            hint = engine({"edges": np.ascontiguousarray(golden.hint.numpy())})["hint"].copy()
        self._constants: dict[str, npt.NDArray[Any]] = {"hint": hint, "control_scale": np.array(1, np.float32)}
        self._opened = opened
        self._engine = opened(DENOISER)
        self._stage = -1

    def residuals(self, latent: Array, timestep: int, stage: int) -> list[Array]:
        """See `Denoiser.residuals`; by the graph `controlnet`."""
        feeds = self._constants | self._step(latent, timestep) | {"kv_control": self._kv_control(stage)}
        with closing(self._opened(CONTROLNET)) as engine:
            return [value.copy() for value in engine(feeds).values()]

    def eps(self, latent: Array, timestep: int, stage: int) -> Array:
        """See `Denoiser.eps`."""
        if stage != self._stage:
            halves = [self._project(contexts)[0].numpy() for contexts in self._golden.unet_contexts(stage)]
            kv = {"kv_unet": np.stack(halves), "kv_control": self._kv_control(stage)}
            self._engine.bind_inputs({**self._constants, **kv})
            self._stage = stage
        return self._engine(self._step(latent, timestep))["eps"]

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()

    def _kv_control(self, stage: int) -> Array:
        return self._project(self._golden.style_contexts(stage))[1].numpy()

    def _step(self, latent: Array, timestep: int) -> dict[str, npt.NDArray[Any]]:
        return {"latent": np.ascontiguousarray(latent), "timestep": np.full(len(latent), timestep, np.int64)}


def export_graphs(base: Base, folder: Path, progress: Progress) -> None:
    """Write the graphs ``controlnet_cond``, ``controlnet`` and ``denoiser`` of `base`, in float32, to `folder`.

    Raises:
        ExportError: a graph that cannot be exported.
    """
    weights = {
        f"{prefix}.{key}": value.contiguous()
        for prefix in ("unet", "controlnet")
        for key, value in base.networks()[prefix].state_dict().items()
    }
    save_file(weights, folder / _WEIGHTS)
    for name, graph in trace_graphs(base, (CONTROLNET_COND, CONTROLNET, DENOISER), progress).items():
        save_graph(graph, folder / _WEIGHTS, folder / f"{name}.onnx")
