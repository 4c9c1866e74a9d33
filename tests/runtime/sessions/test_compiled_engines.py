"""Painting with compiled engines on a fake GPU, whose kernels are ONNX Runtime's: the paintings are those of ONNX
Runtime. No GPU runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lsast
from fake_gpu import FakeCuda, FakeTrt, Kernel, Shapes, onnx_kernel, write_engine
from lsast import BackendError, Stylizer
from lsast.sampling.networks import NotFiniteError
from lsast_engines.backends.tensorrt import engine as tensorrt
from lsast_engines.backends.tensorrt.engine_record import engine_folder
from lsast_engines.backends.tensorrt.shape_profile import Range, ShapeRanges
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS

RANGES = ShapeRanges(Range(64, 64, 128), Range(1, 1, 3))
LARGE = {"size": 0}


def cells(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    return (shape[0], channels, shape[2] // 8, shape[3] // 8)


OUTPUTS: dict[str, Callable[[Shapes], Shapes]] = {
    "vae_encoder": lambda shapes: {name: cells(shapes["image"], 4) for name in ("mean", "std")},
    "controlnet_cond": lambda shapes: {"hint": cells(shapes["edges"], 5)},
    "denoiser": lambda shapes: {"eps": (*shapes["kv_unet"][:2], *shapes["latent"][1:])},
    "vae_decoder": lambda shapes: {"image": (shapes["latent"][0], 3, *(8 * side for side in shapes["latent"][2:]))},
}


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
        kernels[name] = onnx_kernel(path, spec, OUTPUTS[name])
        for library in ("tensorrt", "tensorrt-rtx"):
            folder = engine_folder(bundle.path, library, "fp16")  # type: ignore[arg-type]
            write_engine(path, spec, folder, library, RANGES, "fp16")  # type: ignore[arg-type]
    trt = FakeTrt(cuda, kernels)
    monkeypatch.setattr(tensorrt, "devices", lambda library: ["cuda"])
    monkeypatch.setattr(tensorrt, "load_library", lambda library: trt)
    monkeypatch.setattr(tensorrt, "load_cuda", lambda: cuda)
    return trt


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def on_gpu(request: pytest.FixtureRequest, bundle_path: Path, trt: FakeTrt) -> Iterator[Stylizer]:
    with lsast.load(bundle_path, request.param) as stylizer:
        yield stylizer
    assert not trt.cuda.memory
    assert not trt.cuda.objects


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


CASES: list[dict[str, Any]] = [
    {},
    {"solver": "unipc", "steps": 9, "strength": 1.0, "style": "monet"},
    {"guidance": 1.0, "control_scale": 0.0},
    {"style": "monet@up+vangogh@0-4", "solver": "ddim"},
]


@pytest.mark.parametrize("change", CASES, ids=str)
def test_stylize_with_compiled_engines_gives_the_painting_of_onnxruntime(
    on_gpu: Stylizer, on_cpu: Stylizer, picture: np.ndarray, change: dict[str, Any]
) -> None:
    alike(on_gpu.stylize(picture, **LARGE, **change), on_cpu.stylize(picture, **LARGE, **change))


@pytest.mark.parametrize("lever", ["mask", "tile"])
def test_stylize_with_compiled_engines_takes_masks_and_tiles(
    on_gpu: Stylizer, on_cpu: Stylizer, picture: np.ndarray, lever: str
) -> None:
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[:, 40:] = 255
    change: dict[str, Any] = {"mask": {"mask": mask}, "tile": {"tile": 64}}[lever]
    large = np.tile(picture, (1, 2, 1)) if lever == "tile" else picture
    alike(on_gpu.stylize(large, **LARGE, **change), on_cpu.stylize(large, **LARGE, **change))


def test_stylize_many_with_compiled_engines_runs_the_denoiser_once_a_step(
    on_gpu: Stylizer, on_cpu: Stylizer, cuda: FakeCuda, picture: np.ndarray
) -> None:
    rows = [
        {"style": "vangogh", "seed": 1, "solver": "ddim"},
        {"style": "monet", "seed": 2, "solver": "unipc", "guidance": 2.5},
        {"style": "vangogh:2+monet", "seed": 3, "solver": "dpmpp2m", "steps": 8},
    ]
    rows = [{"steps": 8, "strength": 0.5, **row} for row in rows]
    cuda.calls.clear()
    painted = list(on_gpu.stylize_many([picture] * 3, rows=rows, batch=3, **LARGE))
    # Of each picture hint, mean and deviation, and the painting; of the batch the noise of its four steps.
    assert cuda.calls.count("download") == 3 * 4 + 4
    for found, row in zip(painted, rows, strict=True):
        alike(found, on_cpu.stylize(picture, **row, **LARGE))


def test_stylize_with_compiled_engines_that_overflow_raises(
    trt: FakeTrt, bundle_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = trt.graphs["denoiser"]

    def overflow(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        eps = kernel.run(feeds)["eps"].copy()
        eps[..., 0] = np.inf
        return {"eps": eps}

    trt.graphs["denoiser"] = Kernel(kernel.spec, overflow, kernel.shapes)
    with (
        lsast.load(bundle_path, "tensorrt") as stylizer,
        pytest.raises(NotFiniteError, match="not finite, on tensorrt"),
    ):
        stylizer.stylize(picture, **LARGE)


def test_load_without_a_compiled_engine_names_the_command(trt: FakeTrt, bundle_path: Path) -> None:
    (engine_folder(bundle_path, "tensorrt", "fp16") / "controlnet_cond.engine").unlink()
    with pytest.raises(BackendError, match=r"(?s)found no engine .*controlnet_cond.*lsast-export compile .*--build"):
        lsast.load(bundle_path, "tensorrt")
