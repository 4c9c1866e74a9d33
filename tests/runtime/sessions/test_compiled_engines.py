"""Painting with compiled engines on a fake GPU, which checks order, addresses and lifetimes, and whose kernels are ONNX
Runtime's: the paintings are those of ONNX Runtime. No GPU runs here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lsast
from fake_gpu import FakeCuda, FakeTrt, Kernel, Status, write_engine
from lsast import BackendError, Stylizer
from lsast_engines.backends.tensorrt import engine as tensorrt
from lsast_engines.backends.tensorrt.engine_record import Range, ShapeRanges, engine_folder
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS, VAE_ENCODER

RANGES = ShapeRanges(Range(64, 64, 128), Range(1, 1, 3))
FLAVORS: Any = ("tensorrt", "tensorrt-rtx")
LARGE: dict[str, Any] = {"size": 0, "steps": 8, "strength": 0.5}
"""Options of four steps, each of a stage of its own."""


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(cuda: FakeCuda, bundle_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTrt:
    """The library, with engines of the tiny bundle where they are looked for."""
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    bundle = Bundle.open(bundle_path)
    kernels = {}
    for name in REQUIRED_GRAPHS:
        spec, path = bundle.manifest.graphs[name], bundle.graph_path(name)
        kernels[name] = Kernel(spec, path)
        for flavor in FLAVORS:
            write_engine(path, spec, engine_folder(bundle.path, flavor, "fp16"), flavor, RANGES)
    trt = FakeTrt(cuda, kernels)
    monkeypatch.setattr(tensorrt, "devices", lambda flavor: ["cuda"])
    monkeypatch.setattr(tensorrt, "load_library", lambda flavor: trt)
    monkeypatch.setattr(tensorrt.cuda, "load_cuda", lambda: cuda)
    return trt


@pytest.fixture(params=FLAVORS)
def on_gpu(request: pytest.FixtureRequest, bundle_path: Path, trt: FakeTrt) -> Iterator[Stylizer]:
    """After each test nothing is left on the GPU."""
    with lsast.load(bundle_path, request.param) as stylizer:
        yield stylizer
        stylizer.close()
        ended = len(trt.cuda.calls)
    assert len(trt.cuda.calls) == ended  # closing twice frees once
    left = (trt.cuda.memory, trt.cuda.streams, trt.cuda.graphs, trt.cuda.executables, trt.cuda.objects)
    assert not any(left)


@pytest.fixture
def on_cpu(bundle_path: Path) -> Iterator[Stylizer]:
    with lsast.load(bundle_path, "onnxruntime") as stylizer:
        yield stylizer


@pytest.fixture
def picture() -> np.ndarray:
    rng = np.random.default_rng(5)
    return np.repeat(np.repeat(rng.integers(60, 200, (8, 12, 3), dtype=np.uint8), 8, axis=0), 8, axis=1)


def alike(found: lsast.Result, expected: lsast.Result) -> None:
    pictures = [np.asarray(result.image).astype(int) for result in (found, expected)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # where a value lies on the edge of two grey levels
    assert np.mean(pictures[0] != pictures[1]) < 0.01


def test_paintings_with_compiled_engines_are_those_of_onnxruntime(on_gpu, on_cpu, cuda, picture):
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[:, 40:] = 255
    rows: list[dict[str, Any]] = [
        {"style": "vangogh", "seed": 1, "solver": "ddim"},
        {"style": "monet", "seed": 2, "solver": "unipc", "guidance": 2.5},
        {"style": "vangogh:2+monet@up", "seed": 3, "solver": "dpmpp2m", "mask": mask},
    ]
    cuda.calls.clear()
    painted = list(on_gpu.stylize_many([picture] * 3, rows=rows, batch=3, **LARGE))
    # Of each picture hint, mean and deviation, and the painting; of the batch the noise of its four steps.
    assert cuda.calls.count("download") == 3 * 4 + 4
    for found, row in zip(painted, rows, strict=True):
        alike(found, on_cpu.stylize(picture, **row, **LARGE))
    large, options = np.tile(picture, (1, 2, 1)), {**LARGE, "tile": 64, "guidance": 1.0, "control_scale": 0.0}
    alike(on_gpu.stylize(large, **options), on_cpu.stylize(large, **options))


def test_denoiser_is_captured_at_its_second_step_and_working_memory_given_back(on_gpu, cuda, picture):
    opened = len(cuda.memory)
    for large in (picture, picture, np.tile(picture, (2, 1, 1))):
        cuda.calls.clear()
        on_gpu.stylize(large, **LARGE)
        counts = {name: cuda.calls.count(name) for name in ("execute", "launch", "malloc", "address", "upload")}
        # Four graphs; the denoiser runs once plainly, once into the graph, which is launched from the second step on.
        # TensorRT-RTX captures by itself.
        captured = on_gpu.backend == "tensorrt"
        assert (counts["execute"], counts["launch"]) == ((3 + 2, 3) if captured else (3 + 4, 0))
        assert ("begin capture" in cuda.calls) is captured
        assert (counts["malloc"], counts["address"]) == (4, 0)  # the working memory of each graph
        # Picture, edges, latent to decode; hint and scale; of every step latent, timestep, and keys and values.
        assert counts["upload"] == 3 + 2 + 4 * 4
        assert (len(cuda.memory), len(cuda.executables)) == (opened, 0)


def test_rtx_engines_compile_kernels_eagerly_and_cache_them(trt, bundle_path):
    lsast.load(bundle_path, "tensorrt-rtx").close()
    config = trt.configs[0]
    assert config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert config.dynamic_shapes_kernel_specialization_strategy == trt.DynamicShapesKernelSpecializationStrategy.EAGER
    kept = engine_folder(bundle_path, "tensorrt-rtx", "fp16") / "denoiser.engine.kernels"
    assert kept.read_bytes() == trt.kernels
    lsast.load(bundle_path, "tensorrt-rtx").close()
    assert trt.configs[-1].cache.known == trt.kernels


@pytest.mark.parametrize("at", [0, 1])
def test_run_that_fails_names_the_reason_and_the_next_painting_is_whole(on_gpu, trt, picture, at):
    expected = on_gpu.stylize(picture, **LARGE).image

    def fail(step: int, *_: object) -> None:
        trt.failing = step == at

    with pytest.raises(BackendError, match="an illegal memory access"):
        on_gpu.stylize(picture, **LARGE, on_step=fail)
    assert trt.cuda.captured is None
    trt.failing = False
    np.testing.assert_array_equal(on_gpu.stylize(picture, **LARGE).image, expected)


def test_picture_beyond_the_profile_is_refused_before_it_runs(on_gpu, cuda, picture):
    with pytest.raises(BackendError, match=r"image: found \[1, 3, 64, 192\]; expected \[1, 3, 64, 64\] to"):
        on_gpu.stylize(np.tile(picture, (1, 2, 1)), **LARGE)
    assert "execute" not in cuda.calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"library_version": "1.6.0"}, r"library_version: found 1.6.0; expected 1.7.1\n.*with: lsast-export compile"),
        ({"content": b"no engine, but recorded as one"}, r"refuses .*\n.*magicTag"),
        ({}, r"found no engine .*vae_encoder.*\n  compile with: lsast-export compile .* --backend tensorrt .*--build"),
    ],
)  # fmt: skip
def test_load_with_an_engine_of_something_else_says_what_differs_and_how_to_compile(trt, bundle_path, changes, message):
    bundle, folder = Bundle.open(bundle_path), engine_folder(bundle_path, "tensorrt", "fp16")
    if changes:
        graph, spec = bundle.graph_path(VAE_ENCODER), bundle.manifest.graphs[VAE_ENCODER]
        write_engine(graph, spec, folder, "tensorrt", RANGES, **changes)
    else:
        (folder / "vae_encoder.engine").unlink()
    with pytest.raises(BackendError, match=f"(?s){message}"):
        lsast.load(bundle_path, "tensorrt")
    assert not any((trt.cuda.memory, trt.cuda.streams))


def test_load_without_a_gpu_or_enough_memory_says_so_and_leaves_nothing(trt, bundle_path):
    trt.cuda.room = 20_000
    with pytest.raises(BackendError, match="cudaMalloc failed: cudaErrorMemoryAllocation"):
        lsast.load(bundle_path, "tensorrt")
    assert not any((trt.cuda.memory, trt.cuda.streams, trt.cuda.objects))
    trt.cuda.driver = Status.cudaErrorInsufficientDriver
    with pytest.raises(BackendError, match=r"found no NVIDIA GPU for tensorrt: .* \(35\); no NVIDIA driver, or one"):
        lsast.load(bundle_path, "tensorrt")
