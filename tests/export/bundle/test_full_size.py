"""Stable Diffusion 1.5 at full size, random weights: memory, parity and painting, by `benchmarks/sd15_random.py`."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fp16_rounding import SumsInFloat, round_every_result
from graph_runs import run_graph
from lsast_engines.backends.onnxruntime import GPU_SUFFIX
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS, UNET_SPLIT_GRAPHS
from lsast_train.base.lazy_base import open_base

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DENOISER = 4 * (859_520_964 + 361_279_120)
"""Bytes of the largest graph in fp32."""
WEIGHTS = DENOISER + 4 * 83_653_863
"""Bytes of all graphs in fp32, which they are in while they run."""


def script(*arguments: Any) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sd15_random", *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    return json.loads(done.stdout) if done.stdout else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    memory = Path("/proc/meminfo")
    if not memory.is_file() or int(memory.read_text().split("MemAvailable:")[1].split()[0]) < 9_000_000:
        pytest.skip("needs Linux and 9 GB of free memory")
    folder = tmp_path_factory.mktemp("sd15")
    if shutil.disk_usage(folder).free < 20e9:
        pytest.skip("needs 20 GB of free disk")
    script("build", folder)
    return folder


class Exports(dict[str, dict[str, Any]]):
    """What the export of each storage type reported; it is exported when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, storage_dtype: str) -> dict[str, Any]:
        (self[storage_dtype],) = script("export", self._folder, "--storage-dtype", storage_dtype, "--json")["rows"]
        return self[storage_dtype]

    def bundle(self, storage_dtype: str) -> Path:
        """The bundle's folder."""
        assert self[storage_dtype]
        return self._folder / storage_dtype


@pytest.fixture(scope="module")
def exported(folder: Path) -> Exports:
    return Exports(folder)


@pytest.mark.parametrize("storage_dtype", ["fp32", "bf16"])
def test_export_needs_little_more_than_the_largest_graph(exported, storage_dtype):
    row = exported[storage_dtype]
    assert row["peak_rss_gb"] * 1e9 <= 1.5 * DENOISER
    assert set(row["parity"]) == {*REQUIRED_GRAPHS, *UNET_SPLIT_GRAPHS, "loop"}
    assert all(0 < error < 1e-4 for error in row["parity"].values())


@pytest.mark.parametrize("storage_dtype", ["fp32", "bf16"])
def test_painting_needs_little_more_than_the_weights(exported, folder, storage_dtype):
    assert exported[storage_dtype]
    for row in script("run", folder, "--storage-dtype", storage_dtype, "--steps", 2, "--json")["rows"]:
        assert row["peak_rss_gb"] * 1e9 <= WEIGHTS + 2e9, row
        assert set(row["phases"]) >= {"open", "read", "edges", "encode", "denoise", "decode", "save"}


def test_eight_bits_are_made_in_the_memory_of_an_export(exported, folder):
    command = [sys.executable, "-m", "lsast_export", "quantize", exported.bundle("fp32"), "--out", folder / "int8",
               "--pictures", 1, "--size", 128, "--target", 30, "--json"]  # fmt: skip
    done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE)
    facts = json.loads(done.stdout)
    assert facts["peak_rss_bytes"] <= 1.5 * DENOISER
    assert facts["bytes"] <= 0.35 * WEIGHTS


@pytest.mark.parametrize(
    ("graph", "bound"), [("vae_encoder", 1e-5), ("controlnet_cond", 1e-3), ("denoiser", 3e-3), ("vae_decoder", 1e-2)]
)
def test_graphs_for_gpus_are_near_the_exported_ones_as_diffusers_in_fp16_is(exported, graph, bound):
    """At 256², with every value of the fp16 graph rounded, as a GPU does."""
    from benchmarks.gpu_day.engine_steps import random_feeds

    bundle = Bundle.open(exported.bundle("fp32"), verify_hashes=False)
    feeds = random_feeds(bundle.manifest.graphs[graph], 32)
    rounded = bundle.path / "rounded.onnx"
    halves = round_every_result(bundle.path / f"{graph}{GPU_SUFFIX}", rounded)
    assert (halves == 0) == (graph == "vae_encoder")  # which is in float32
    paths = (bundle.graph_path(graph), rounded)
    expected, found = (run_graph(path, feeds, optimize=False, threads=2) for path in paths)
    for (name, values), theirs in zip(expected.items(), in_torch(bundle.path, graph, feeds), strict=True):
        ours, diffusers = (np.abs(other - values).max() / np.abs(values).max() for other in (found[name], theirs))
        assert ours <= min(bound, 1.4 * diffusers), (name, ours, diffusers)


def in_torch(folder: Path, graph: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What diffusers' networks in fp16 give for a graph's inputs."""
    from lsast_export.graphs.modules import base_on_meta, graph_module

    parts = open_base(folder)
    names = {"denoiser": ("unet", "controlnet"), "controlnet_cond": ("controlnet",)}.get(graph, ("autoencoder",))
    base = dataclasses.replace(base_on_meta(parts), **{name: parts.load(name, torch.float16) for name in names})
    inputs = [torch.from_numpy(value) for value in feeds.values()]
    with torch.no_grad(), SumsInFloat():
        outputs = graph_module(base, graph)(*(value.half() if value.is_floating_point() else value for value in inputs))
    return [output.float().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


@pytest.mark.needs("tensorrt_rtx")
def test_the_denoiser_compiles_ahead_of_time(exported, folder):
    if int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) < 14_000_000:
        pytest.skip("needs 14 GB of free memory")
    assert exported["fp32"]
    options = ("--storage-dtype", "fp32", "--sm", "8.9", "--graph", "denoiser", "--json")
    (row,) = script("compile", folder, *options)["rows"]
    assert (row["compute_dtype"], row["targets"]) == ("fp16", "8.9")
    # Weights in halves, once; anything more would be some that are stored twice.
    assert 1 < row["engine_gb"] * 1e9 / (DENOISER / 2) < 1.05
    assert row["peak_rss_gb"] * 1e9 < 3 * DENOISER
