import gc
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from xdist.scheduler import LoadFileScheduling

import compvis_names

NO_SKIPS = "LSAST_TESTS_NEED"
"""Environment variable: set, a test that is marked ``needs`` fails where its modules are missing; see .ci/run."""


def pytest_configure(config: pytest.Config) -> None:
    """What tiny networks on a busy machine need in order to be quick."""
    worker = getattr(config, "workerinput", {})
    number = re.fullmatch(r"gw(\d+)", worker.get("workerid", ""))
    if number and hasattr(os, "sched_setaffinity"):
        # Each process has cores of its own: libraries take as many threads as they see cores, and threads of two
        # processes that share a core wait for each other.
        cores = sorted(os.sched_getaffinity(0))
        count = min(worker["workercount"], len(cores))
        place = int(number[1]) % count
        os.sched_setaffinity(0, cores[place * len(cores) // count : (place + 1) * len(cores) // count])
    # torch's tracer makes objects by the million: a fifth of its time went into collecting garbage.
    gc.set_threshold(100_000, 50, 50)
    # Threads that wait for one another cost a hundred times what they save.
    torch.set_num_threads(1)


TRACED = ("tests/export/", "tests/test_compvis_journey.py")
"""Tests that share traced graphs (`one_trace`): they stay in one process."""

LONG = ("tests/test_docs.py", "tests/train/test_two_processes.py")
"""Files of few tests that take long: they begin first, lest one process ends with them while the other waits."""


class _OneTrace(LoadFileScheduling):
    """A file stays in one process, and so do the tests that share the exporter's traced graphs, which take long."""

    def _split_scope(self, nodeid: str) -> str:
        if os.environ.get(NO_SKIPS):  # .ci/run selects few tests; most of them share nothing
            return nodeid
        file: str = super()._split_scope(nodeid)
        return "traced" if file.startswith(TRACED) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _OneTrace(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long. Skip what is marked ``needs`` where its modules are missing."""
    items.sort(key=lambda item: not item.nodeid.startswith((*TRACED, *LONG)))
    if os.environ.get(NO_SKIPS):
        return
    for item in items:
        for marker in item.iter_markers("needs"):
            if missing := [name for name in marker.args if importlib.util.find_spec(name) is None]:
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)} (.ci/run has them)"))


@pytest.fixture(scope="session", autouse=True)
def _home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the runtime keeps between runs is not kept in the home of the person who runs the tests.

    Nor do defaults depend on the processor: `auto` takes ONNX Runtime in fp32.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSAST_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("LSAST_PROCESSOR", "")
        yield


@pytest.fixture(scope="session")
def one_trace() -> Iterator[None]:
    """A graph of one architecture is traced once: it takes nearly all the time of an export, and reads no weight."""
    from lsast_export.graphs import trace as tracing

    traces: dict[str, tracing.TracedGraph] = {}

    def trace_once(module: Any, *arguments: Any) -> tracing.TracedGraph:
        public = [{k: v for k, v in getattr(module, name).config.items() if k[0] != "_"} for name in module.networks]
        configs = json.dumps(public, sort_keys=True)  # which makes tuples lists, as a file does
        key = repr((replace(module._base.config, name="", training={}), configs, arguments))
        if key not in traces:
            traces[key] = trace(module, *arguments)
        return traces[key]

    trace = tracing.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "trace", trace_once)
        yield


TINY_UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
"""Half of Stable Diffusion 1.5's levels, a tenth of its width; its text encoder has one head of 64 channels."""


@dataclass(frozen=True)
class CompvisBase:
    """A random base in CompVis naming, and the networks that its files were written from."""

    file: Path
    """U-Net, its EMA, autoencoder, text encoder."""
    controlnet_file: Path
    networks: dict[str, Any]
    """``unet``, ``ema``, ``controlnet``, ``autoencoder`` and ``text_encoder``: diffusers' and transformers' own."""
    tensors: dict[str, torch.Tensor]
    """What is in `file`."""


@pytest.fixture(scope="session")
def compvis_base(tmp_path_factory: pytest.TempPathFactory) -> CompvisBase:
    """A tiny base in CompVis naming with its ControlNet; tests must not change the files."""
    folder = tmp_path_factory.mktemp("compvis")
    networks = compvis_names.random_networks(TINY_UNET)
    tensors = compvis_names.compvis_tensors(networks)
    control = {
        f"control_model.{key}": value for key, value in compvis_names.compvis_network(networks["controlnet"]).items()
    }
    file, controlnet_file = folder / "tiny-v1-5.safetensors", folder / "tiny-canny.safetensors"
    save_file(tensors, file)
    save_file(control, controlnet_file)
    return CompvisBase(file, controlnet_file, networks, tensors)
