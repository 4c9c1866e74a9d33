"""The engine of TensorRT on a fake GPU that checks order, addresses and lifetimes. No GPU runs here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fake_denoiser import SPEC, inputs, step
from fake_gpu import SCRATCH, FakeCuda, FakeTrt
from lsast_engines.backends.tensorrt.engine import TensorRtEngine
from lsast_engines.errors import BackendError

Compiled = Callable[..., Path]
Open = Callable[..., TensorRtEngine]


def test_engine_call_gives_what_the_kernel_computes(compiled: Compiled, open_it: Open) -> None:
    compiled()
    engine = open_it()
    for seed, shape in enumerate([(2, 2, 8, 12), (2, 2, 8, 12), (2, 2, 8, 12), (1, 1, 16, 16), (3, 2, 8, 8)]):
        feeds = inputs(*shape, seed=seed)
        np.testing.assert_array_equal(engine(feeds)["eps"], step(feeds))


def test_engine_second_run_captures_a_graph_with_the_same_bytes(
    compiled: Compiled, open_it: Open, cuda: FakeCuda
) -> None:
    compiled()
    engine = open_it()
    plain = engine(inputs())["eps"].copy()
    assert "launch" not in cuda.calls
    for _ in range(3):
        np.testing.assert_array_equal(engine(inputs())["eps"], plain)
    assert cuda.calls.count("execute") == 2  # once plainly, once into the graph
    assert cuda.calls.count("launch") == 3


def test_engine_allocates_only_for_new_shapes(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    engine = open_it()
    assert cuda.calls.count("malloc") == cuda.calls.count("address") == len(SPEC.inputs) + len(SPEC.outputs)
    # By hand from the profile: 3 pictures of 16 x 16 cells, two rows for guidance.
    sizes = [4 * size for size in (3 * 4 * 256, 3 * 2 * 256, 3 * 2, 2 * 3 * 18, 3 * 12, 1, 2 * 3 * 4 * 256)]
    assert sorted(map(len, cuda.memory.values())) == sorted(sizes)
    for shape in [(1, 2, 8, 8), (3, 2, 16, 16)]:
        engine(inputs(*shape))
        opened = len(cuda.calls)
        assert sorted(map(len, cuda.memory.values())) == sorted([*sizes, SCRATCH])
        for _ in range(3):
            engine(inputs(*shape))
        assert not {"malloc", "address", "free"} & set(cuda.calls[opened:])


def test_release_memory_frees_what_a_run_needs(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    engine = open_it()
    opened = len(cuda.memory)
    for _ in range(2):
        for _ in range(3):
            np.testing.assert_array_equal(engine(inputs())["eps"], step(inputs()))
        assert len(cuda.memory) == opened + 1
        assert len(cuda.executables) == 1
        engine.release_memory()
        assert len(cuda.memory) == opened
        assert not cuda.executables


def test_engine_of_new_shapes_captures_another_graph(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    engine = open_it()
    for _ in range(2):
        engine(inputs())
    assert len(cuda.executables) == 1
    feeds = inputs(1, 2, 16, 16)
    np.testing.assert_array_equal(engine(feeds)["eps"], step(feeds))
    assert not cuda.executables
    engine(feeds)
    assert len(cuda.executables) == 1


def test_bind_inputs_uploads_once(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    engine = open_it()
    feeds = inputs()
    fed = {name: feeds.pop(name) for name in ("latent", "timestep")}
    engine.bind_inputs(feeds)
    expected = step({**fed, **feeds})
    feeds["hint"][:] = 0  # the caller's array is its own again
    cuda.calls.clear()
    for _ in range(3):
        np.testing.assert_array_equal(engine(fed)["eps"], expected)
    assert cuda.calls.count("upload") == 3 * 2
    assert cuda.calls.count("download") == 3


def test_rtx_engine_captures_itself_and_caches_kernels(
    compiled: Compiled, open_it: Open, cuda: FakeCuda, trt: FakeTrt, tmp_path: Path
) -> None:
    compiled("tensorrt-rtx")
    engine = open_it("tensorrt-rtx")
    for _ in range(3):
        np.testing.assert_array_equal(engine(inputs())["eps"], step(inputs()))
    assert "begin capture" not in cuda.calls
    config = trt.configs[0]
    assert config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert config.dynamic_shapes_kernel_specialization_strategy == trt.DynamicShapesKernelSpecializationStrategy.EAGER
    engine.close()
    kept = tmp_path / "tensorrt-rtx" / "fp16" / "denoiser.engine.kernels"
    assert kept.read_bytes() == trt.kernels
    open_it("tensorrt-rtx")
    assert trt.configs[1].cache.known == trt.kernels


@pytest.mark.parametrize("runs", [0, 1])
def test_engine_run_that_fails_names_the_reason_and_runs_again(
    compiled: Compiled, open_it: Open, cuda: FakeCuda, trt: FakeTrt, runs: int
) -> None:
    compiled()
    engine = open_it()
    for _ in range(runs):
        engine(inputs())
    trt.failing = True
    with pytest.raises(BackendError, match="an illegal memory access"):
        engine(inputs())
    assert cuda.captured is None
    trt.failing = False
    np.testing.assert_array_equal(engine(inputs())["eps"], step(inputs()))


def test_engine_call_beyond_the_profile_is_refused(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    engine = open_it()
    with pytest.raises(BackendError, match=r"latent: found \[4, 4, 8, 12\]; expected \[1, 4, 8, 8\] to"):
        engine(inputs(batch=4))
    assert "execute" not in cuda.calls


def test_engine_close_twice_frees_once(compiled: Compiled, open_it: Open, cuda: FakeCuda) -> None:
    compiled()
    engine = open_it()
    engine(inputs())
    engine(inputs())
    ended = len(cuda.calls)
    engine.close()
    engine.close()
    assert (cuda.calls[ended], cuda.calls[-1]) == ("wait", "destroy")
    with pytest.raises(BackendError, match="is closed"):
        engine(inputs())
