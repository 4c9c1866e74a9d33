from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from graph_runs import random_feeds
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_export.bundle.export import ExportOptions, export_bundle
from lsast_export.graphs.trace import TracedGraph, trace_graphs
from lsast_train.base.base import Base
from lsast_train.prompts.matrix_index import matrix_index
from lsast_train.prompts.prompt_file import Prompts

Run = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Styles of the person who runs the tests are neither seen nor touched."""
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def _one_trace(one_trace: None) -> None:
    """All of these tests share traced graphs."""


@pytest.fixture(scope="session")
def base() -> Base:
    """A random v-prediction base of a few ten thousand weights; its fingerprint is no file's."""
    return build_mini(MiniConfig.tiny())


@pytest.fixture(scope="session")
def prompts(base: Base) -> Prompts:
    """Prompts as a training run on `base` would leave them, of random values."""
    matrices = torch.randn(30, base.config.tokens, base.context_dim, generator=torch.Generator().manual_seed(0))
    contexts = matrices[matrix_index("step+layer")]
    return Prompts("hand", base.fingerprint, "step+layer", "direct", "strided", "all", contexts)


@pytest.fixture(scope="session")
def traced(base: Base) -> dict[str, TracedGraph]:
    """The graphs of `base`."""
    return trace_graphs(base)


@pytest.fixture(scope="session")
def bundles(
    base: Base, prompts: Prompts, traced: dict[str, TracedGraph], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """A bundle of each precision, with the style `hand`; tests must not change them."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        storage_dtype: export_bundle(
            base, folder / storage_dtype, [prompts], ExportOptions(storage_dtype=storage_dtype), traced=traced
        )
        for storage_dtype in ("fp32", "fp16", "bf16")
    }


@pytest.fixture
def run() -> Run:
    """Runs a graph of a bundle once on those of `inputs` that it takes: run(bundle, graph, backend=…, **inputs)."""

    def run_once(bundle: Bundle, graph: str, backend: str = "onnxruntime", **feeds: Any) -> dict[str, np.ndarray]:
        spec = bundle.manifest.graphs[graph]
        with closing(open_engine(bundle.graph_path(graph), spec, backend, threads=1)) as engine:
            taken = {tensor.name: feeds[tensor.name] for tensor in spec.inputs}
            return {name: value.copy() for name, value in engine(taken).items()}

    return run_once


@pytest.fixture
def feeds() -> Callable[..., dict[str, np.ndarray]]:
    """Random inputs of the denoiser: feeds(bundle, batch, rows, height, width) in latent cells."""

    def draw(bundle: Bundle, batch: int, rows: int, height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
        lengths = {"B": batch, "G": rows, "h": height, "w": width}
        return random_feeds(bundle.manifest.graphs["denoiser"], lengths, seed)

    return draw
