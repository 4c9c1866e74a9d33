"""Engines that are not what is needed are refused, with what differs and the command that mends it; on a fake GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_denoiser import SPEC
from fake_gpu import FakeCuda, Status
from lsast_engines.backends.tensorrt.engine import TensorRtEngine
from lsast_engines.backends.tensorrt.shape_profile import Range, ShapeRanges
from lsast_engines.errors import BackendError

Compiled = Callable[..., Path]
Open = Callable[..., TensorRtEngine]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"onnx": "0" * 64}, "onnx: found"),
        ({"graph": "vae_decoder"}, "graph: found vae_decoder; expected denoiser"),
        ({"library_version": "1.6.0"}, "library_version: found 1.6.0; expected 1.7.1"),
        ({"compute_dtype": "fp32"}, "compute_dtype: found fp32; expected fp16"),
        ({"targets": ("8.6",)}, "targets: found 8.6; expected 8.9, the GPU's"),
        ({"gpu": "Other GPU"}, "gpu: found Other GPU; expected Fake GPU"),
    ],
)
def test_engine_compiled_from_something_else_names_the_field(
    compiled: Compiled, open_it: Open, cuda: FakeCuda, changes: dict[str, Any], message: str
) -> None:
    compiled(**changes)
    with pytest.raises(BackendError, match=message) as caught:
        open_it()
    assert "it took 42 s last time) with: lsast-export compile" in str(caught.value)
    assert cuda.calls == []


def test_engine_of_a_changed_graph_is_refused(compiled: Compiled, open_it: Open, denoiser_graph: Path) -> None:
    compiled()
    denoiser_graph.write_bytes(b"a graph, exported again")
    with pytest.raises(BackendError, match=r"onnx: found [0-9a-f]{12}…; expected [0-9a-f]{12}…"):
        open_it()


def test_missing_or_truncated_engine_names_the_command(compiled: Compiled, open_it: Open) -> None:
    with pytest.raises(
        BackendError, match=r"found no engine .*\n  compile with: lsast-export compile .* --backend tensorrt"
    ):
        open_it()
    engine = compiled()
    engine.write_bytes(engine.read_bytes()[:100])
    with pytest.raises(BackendError, match=r"bytes: found 100; expected \d+"):
        open_it()


def test_engine_that_the_library_refuses_gives_its_log(compiled: Compiled, open_it: Open) -> None:
    compiled(content=b"no engine, but recorded as one")
    with pytest.raises(BackendError, match=r"refuses .*\n.*magicTag"):
        open_it()


def test_engine_of_another_profile_is_refused(compiled: Compiled, open_it: Open) -> None:
    other = json.dumps({"graph": "denoiser", "profile": ShapeRanges(Range(64, 64, 256)).profile(SPEC)}).encode()
    compiled(content=other)
    with pytest.raises(BackendError, match=r"latent: found profile .*; expected"):
        open_it()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "CUDA lists no GPU; nvidia-smi shows"),
        (
            {"driver": Status.cudaErrorInsufficientDriver},
            r"InsufficientDriver \(35\); no NVIDIA driver, or one",
        ),
        ({"driver": Status.cudaErrorNoDevice}, r"cudaErrorNoDevice \(100\); no NVIDIA GPU"),
    ],
)
def test_engine_without_a_gpu_gives_the_code_and_the_remedy(
    compiled: Compiled, open_it: Open, cuda: FakeCuda, changes: dict[str, Any], message: str
) -> None:
    compiled()
    cuda.__dict__.update(changes)
    with pytest.raises(BackendError, match=f"found no NVIDIA GPU for tensorrt: .*{message}"):
        open_it()


def test_engine_without_enough_memory_leaves_nothing(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    cuda.room = 20_000
    with pytest.raises(BackendError, match="cudaMalloc failed: cudaErrorMemoryAllocation"):
        open_it()
    assert not cuda.memory
    assert not cuda.streams
