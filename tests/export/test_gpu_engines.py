"""Compiled engines on a GPU: what no machine without one can say. Never run yet.

They wait for a card: ``pytest -m gpu tests/export/test_gpu_engines.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lsast_engines.bundle import Bundle
from lsast_engines.cuda import gpus
from lsast_engines.engine_key import Library
from lsast_engines.errors import MissingExtraError
from lsast_engines.loop import DeviceLoop, Run
from lsast_engines.moves import moves
from lsast_engines.profile import Ranges, Span
from lsast_engines.resident import ResidentStyles
from lsast_engines.schedule import Schedule
from lsast_engines.solvers import make_solver
from lsast_engines.tensorrt import TensorRtEngine
from lsast_export.tensorrt import CompileOptions, compile_bundle

pytestmark = pytest.mark.gpu
RANGES = Ranges(Span(64, 64, 128), Span(1, 1, 2))
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def library(request: pytest.FixtureRequest) -> Library:
    chosen: Library = request.param
    pytest.importorskip(chosen.replace("-", "_"), reason=f"not installed: pip install 'lsast[{chosen}]'")
    try:
        there = gpus()
    except MissingExtraError as error:
        pytest.skip(str(error))
    if not there:
        pytest.skip("no NVIDIA GPU with a driver")
    return chosen


@pytest.fixture(params=["fp32", "fp16"])
def denoiser(request: pytest.FixtureRequest, library: Library, bundles: dict[str, Bundle]) -> Iterator[TensorRtEngine]:
    bundle = bundles["fp16"]
    targets = (gpus()[0].capability,) if library == "tensorrt-rtx" else ()
    compile_bundle(bundle.path, CompileOptions(library, targets, RANGES, request.param))
    spec = bundle.manifest.graphs["denoiser"]
    path = bundle.graph_path("denoiser")
    with closing(TensorRtEngine(path, spec, "cuda", None, request.param, library=library)) as engine:
        yield engine


Feeds = Callable[..., dict[str, np.ndarray]]


def test_parity_with_onnxruntime(
    denoiser: TensorRtEngine, bundles: dict[str, Bundle], feeds: Feeds, run: Callable[..., dict[str, np.ndarray]]
) -> None:
    for shape in ((1, 2, 8, 8), (2, 1, 8, 16), (1, 2, 8, 8)):
        inputs = feeds(bundles["fp16"], *shape)
        expected = run(bundles["fp16"], "denoiser", **inputs)["eps"]
        error = np.abs(denoiser(inputs)["eps"] - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE[denoiser.arithmetic]


def test_graph_and_plain_run_are_bit_equal(denoiser: TensorRtEngine, bundles: dict[str, Bundle], feeds: Feeds) -> None:
    inputs = feeds(bundles["fp16"], 1, 2, 8, 8)
    plain = denoiser(inputs)["eps"].copy()
    for _ in range(3):
        np.testing.assert_array_equal(denoiser(inputs)["eps"], plain)


def test_nothing_is_allocated_after_warming_up(
    denoiser: TensorRtEngine, bundles: dict[str, Bundle], feeds: Feeds
) -> None:
    from cuda.bindings import runtime

    inputs = feeds(bundles["fp16"], 1, 2, 8, 8)
    for _ in range(3):
        denoiser(inputs)
    _, free, _ = runtime.cudaMemGetInfo()
    for _ in range(20):
        denoiser(inputs)
    assert runtime.cudaMemGetInfo()[1] == free


def test_a_style_swap_needs_no_engine(
    denoiser: TensorRtEngine, bundles: dict[str, Bundle], feeds: Feeds, tmp_path: Path
) -> None:
    bundle = bundles["fp16"]
    hand = bundle.style("hand")
    styles = ResidentStyles(denoiser, bundle.null_style)
    styles.add("hand", hand)
    inputs = feeds(bundle, 1, 2, 8, 8)
    for stage in (0, 9, 4):
        row = hand.row(stage)
        null = bundle.null_style.row(0)
        fed = {**inputs, "kv_unet": np.stack([null.kv_unet, row.kv_unet])[:, None], "kv_control": row.kv_control[None]}
        styles.bind(["hand"], [stage], guided=True)
        rest = {name: value for name, value in inputs.items() if not name.startswith("kv_")}
        on_device = denoiser(rest)["eps"].copy()
        denoiser.bind({name: fed[name] for name in ("kv_unet", "kv_control")})
        np.testing.assert_array_equal(denoiser(rest)["eps"], on_device)


@pytest.fixture
def plan(bundles: dict[str, Bundle], feeds: Feeds) -> tuple[Run, Schedule]:
    bundle = bundles["fp16"]
    schedule = Schedule.build(bundle.manifest.noise, 8, 1.0, bundle.manifest.stages, "unipc")
    inputs = feeds(bundle, 1, 2, 8, 8)
    table = moves(make_solver("unipc", bundle.manifest.noise, schedule), schedule.abars())
    run = Run(
        latents=inputs["latent"],
        hint=inputs["hint"],
        control=1.0,
        timesteps=np.array([[step.t] for step in schedule.steps], np.int64),
        moves=table[..., None],
        guidance=[3.0],
        styles=["hand"],
        stages=[[step.stage] for step in schedule.steps],
    )
    return run, schedule


def test_the_loop_on_the_device_is_the_hosts(
    denoiser: TensorRtEngine, bundles: dict[str, Bundle], plan: tuple[Run, Schedule]
) -> None:
    """The same engine called step by step, with the solver in NumPy; and every run of the loop the same bytes."""
    bundle, (run, schedule) = bundles["fp16"], plan
    hand, null = bundle.style("hand"), bundle.null_style.row(0)
    solver = make_solver("unipc", bundle.manifest.noise, schedule)
    denoiser.bind({"hint": run.hint, "control_scale": np.array(run.control, np.float32)})
    latent = run.latents
    for step in schedule.steps:
        row = hand.row(step.stage)
        halves = np.stack([null.kv_unet, row.kv_unet])[:, None]
        denoiser.bind({"kv_unet": halves, "kv_control": row.kv_control[None]})
        eps = denoiser({"latent": latent, "timestep": np.array([step.t])})["eps"]
        latent = solver.step(eps[0] + np.float32(3) * (eps[1] - eps[0]), step.index, latent)
    loop = DeviceLoop(denoiser, bundle.null_style)
    loop.styles.add("hand", hand)
    first = loop.run(run)  # its first step plainly, the others as a graph
    error = np.abs(first - latent).max() / np.abs(latent).max()
    assert error < TOLERANCE[denoiser.arithmetic]
    np.testing.assert_array_equal(loop.run(run), first)


def test_the_loop_allocates_nothing_after_warming_up(
    denoiser: TensorRtEngine, bundles: dict[str, Bundle], plan: tuple[Run, Schedule]
) -> None:
    from cuda.bindings import runtime

    loop = DeviceLoop(denoiser, bundles["fp16"].null_style)
    loop.styles.add("hand", bundles["fp16"].style("hand"))
    for _ in range(2):
        loop.run(plan[0])
    _, free, _ = runtime.cudaMemGetInfo()
    for _ in range(10):
        loop.run(plan[0])
    assert runtime.cudaMemGetInfo()[1] == free
