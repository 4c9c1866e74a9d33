"""Compiled engines on a GPU: what no machine without one can say. Never run yet.

They wait for a card: ``pytest -m gpu tests/export/tensorrt/test_gpu_engines.py``.
"""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from lsast_engines.backends.tensorrt.cuda import gpus
from lsast_engines.backends.tensorrt.engine import TensorRtEngine
from lsast_engines.backends.tensorrt.engine_record import Range, ShapeRanges, TrtFlavor
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.errors import MissingExtraError
from lsast_export.tensorrt.compile import CompileOptions, compile_bundle

pytestmark = pytest.mark.gpu
RANGES = ShapeRanges(Range(64, 64, 128), Range(1, 1, 2))
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def library(request: pytest.FixtureRequest) -> TrtFlavor:
    chosen: TrtFlavor = request.param
    pytest.importorskip(chosen.replace("-", "_"), reason=f"not installed: pip install 'lsast[{chosen}]'")
    try:
        there = gpus()
    except MissingExtraError as error:
        pytest.skip(str(error))
    if not there:
        pytest.skip("no NVIDIA GPU with a driver")
    return chosen


@pytest.fixture(params=["fp32", "fp16"])
def denoiser(
    request: pytest.FixtureRequest, library: TrtFlavor, bundles: dict[str, Bundle]
) -> Iterator[TensorRtEngine]:
    bundle = bundles["fp16"]
    targets = (gpus()[0].capability,) if library == "tensorrt-rtx" else ()
    compile_bundle(bundle.path, CompileOptions(library, targets, RANGES, request.param))
    spec = bundle.manifest.graphs["denoiser"]
    path = bundle.graph_path("denoiser")
    with closing(TensorRtEngine(path, spec, "cuda", None, request.param, flavor=library)) as engine:
        yield engine


def test_engine_matches_onnx_runtime(denoiser, bundles, feeds, run):
    for shape in ((1, 2, 8, 8), (2, 1, 8, 16), (1, 2, 8, 8)):
        inputs = feeds(bundles["fp16"], *shape)
        expected = run(bundles["fp16"], "denoiser", **inputs)["eps"]
        error = np.abs(denoiser(inputs)["eps"] - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE[denoiser.compute_dtype]


def test_engine_with_a_cuda_graph_gives_the_same_bits(denoiser, bundles, feeds):
    inputs = feeds(bundles["fp16"], 1, 2, 8, 8)
    plain = denoiser(inputs)["eps"].copy()
    for _ in range(3):
        np.testing.assert_array_equal(denoiser(inputs)["eps"], plain)


def test_engine_allocates_nothing_after_warm_up(denoiser, bundles, feeds):
    from cuda.bindings import runtime

    inputs = feeds(bundles["fp16"], 1, 2, 8, 8)
    for _ in range(3):
        denoiser(inputs)
    _, free, _ = runtime.cudaMemGetInfo()
    for _ in range(20):
        denoiser(inputs)
    assert runtime.cudaMemGetInfo()[1] == free


def test_engine_takes_styles_as_inputs(denoiser, bundles, feeds, run):
    bundle = bundles["fp16"]
    hand, null = bundle.style("hand"), bundle.null_style.stage(0)
    inputs = {name: value for name, value in feeds(bundle, 1, 2, 8, 8).items() if not name.startswith("kv_")}
    for stage in (0, 9, 4):
        row = hand.stage(stage)
        context = {"kv_unet": np.stack([null.kv_unet, row.kv_unet])[:, None], "kv_control": row.kv_control[None]}
        expected = run(bundle, "denoiser", **inputs, **context)["eps"]
        denoiser.bind_inputs(context)
        error = np.abs(denoiser(inputs)["eps"] - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE[denoiser.compute_dtype]
