"""Painting through the loop on a fake GPU, whose kernels are ONNX Runtime's: the same paintings, asked of the device in
another way. No GPU runs here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lsast
from fake_denoiser import advance_kernel
from fake_gpu import FakeCuda, FakeTrt, Kernel, Shapes, onnx_kernel, write_engine
from lsast import BackendError, CancelledError, CancelToken, Stylizer, on_device
from lsast.sampler import NotFiniteError
from lsast_engines import tensorrt
from lsast_engines.bundle import Bundle
from lsast_engines.engine_key import engine_folder
from lsast_engines.loop import ADVANCE_GRAPH, DeviceLoop
from lsast_engines.profile import Ranges, Span
from lsast_engines.spec import ADVANCE, EVERY, advance_spec

RANGES = Ranges(Span(64, 64, 128), Span(1, 1, 3))
LARGE = {"size": 0}


def cells(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    return (shape[0], channels, shape[2] // 8, shape[3] // 8)


OUTPUTS: dict[str, Callable[[Shapes], Shapes]] = {
    "encoder": lambda shapes: {name: cells(shapes["image"], 4) for name in ("mean", "std")},
    "hint": lambda shapes: {"hint": cells(shapes["edges"], 5)},
    "denoiser": lambda shapes: {"eps": (*shapes["kv_unet"][:2], *shapes["latent"][1:])},
    "decoder": lambda shapes: {"image": (shapes["latent"][0], 3, *(8 * side for side in shapes["latent"][2:]))},
}


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(cuda: FakeCuda, bundle_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTrt:
    """The library, with engines of the tiny bundle and of ``advance`` where they are looked for."""
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    bundle = Bundle.open(bundle_path)
    kernels = {ADVANCE: advance_kernel()}
    for name in ("encoder", "hint", "denoiser", "decoder"):
        spec, path = bundle.manifest.graphs[name], bundle.graph_path(name)
        kernels[name] = onnx_kernel(path, spec, OUTPUTS[name])
        for library in ("tensorrt", "tensorrt-rtx"):
            folder = engine_folder(bundle.path, library, "fp32")  # type: ignore[arg-type]
            write_engine(path, spec, folder, library, RANGES, "fp32")  # type: ignore[arg-type]
            write_engine(ADVANCE_GRAPH, advance_spec(), folder, library, RANGES, "fp32")  # type: ignore[arg-type]
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


def loop_of(stylizer: Stylizer) -> DeviceLoop | None:
    engine: Any = stylizer._workshop.engines["denoiser"]
    return next((each for each in engine.dependents if isinstance(each, DeviceLoop)), None)


def alike(found: lsast.Result, expected: lsast.Result) -> None:
    pictures = [np.asarray(result.image).astype(int) for result in (found, expected)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # where a value lies on the edge of two grey levels
    assert np.mean(pictures[0] != pictures[1]) < 0.01


CASES: list[dict[str, Any]] = [
    {},
    {"solver": "dpmpp2m", "steps": 12, "seed": 3},
    {"solver": "unipc", "steps": 9, "strength": 1.0, "style": "monet"},
    {"guidance": 1.0, "control": 0.0},
    {"guidance": 0.0, "strength": 0.05},
    {"style": "vangogh:0.6+monet:0.4"},
    {"style": "monet@up+vangogh@0-4", "solver": "ddim"},
    {"steps": 50, "strength": 0.7, "solver": "released"},
]


@pytest.mark.parametrize("change", CASES, ids=str)
def test_plain_paintings_are_the_hosts_and_come_back_once(
    on_gpu: Stylizer, on_cpu: Stylizer, cuda: FakeCuda, picture: np.ndarray, change: dict[str, Any]
) -> None:
    cuda.calls.clear()
    alike(on_gpu.stylize(picture, **LARGE, **change), on_cpu.stylize(picture, **LARGE, **change))
    assert loop_of(on_gpu) is not None
    # Hint, mean and deviation, the painted latent, the picture.
    assert cuda.calls.count("download") == 5


@pytest.mark.parametrize("low", [250, 1000])
def test_guidance_that_rests_at_some_steps_is_the_hosts_say(
    on_gpu: Stylizer, on_cpu: Stylizer, picture: np.ndarray, low: int
) -> None:
    change = {**LARGE, "guidance": 3.0, "guidance_low": low}
    alike(on_gpu.stylize(picture, **change), on_cpu.stylize(picture, **change))
    assert loop_of(on_gpu) is None


def test_a_batch_of_unlike_rows_is_one_loop(
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
    assert cuda.calls.count("download") == 3 * 4 + 1
    for found, row in zip(painted, rows, strict=True):
        alike(found, on_cpu.stylize(picture, **row, **LARGE))


def mask_of(picture: np.ndarray) -> np.ndarray:
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[:, 40:] = 255
    return mask


@pytest.mark.parametrize("lever", ["mask", "strength", "tile", "guidance"])
def test_what_needs_a_say_between_steps_is_the_hosts(
    on_gpu: Stylizer, on_cpu: Stylizer, picture: np.ndarray, lever: str
) -> None:
    change: dict[str, Any] = {
        "mask": {"mask": mask_of(picture)},
        "strength": {"strength": "0.7,0.4@0-2"},
        "tile": {"tile": 64},
        "guidance": {"guidance_low": 300},
    }[lever]
    large = np.tile(picture, (1, 2, 1)) if lever == "tile" else picture
    alike(on_gpu.stylize(large, **LARGE, **change), on_cpu.stylize(large, **LARGE, **change))
    assert loop_of(on_gpu) is None


def test_the_second_frame_is_the_hosts(on_gpu: Stylizer, on_cpu: Stylizer, cuda: FakeCuda, picture: np.ndarray) -> None:
    frames = [picture, np.roll(picture, 8, axis=1)]
    expected = list(on_cpu.stylize_frames(frames, **LARGE))
    downloads = []
    for found, wanted in zip(on_gpu.stylize_frames(frames, **LARGE), expected, strict=True):
        alike(found, wanted)
        downloads.append(cuda.calls.count("download"))
    assert downloads[0] == 5
    assert downloads[1] > 2 * 5


def test_previews_and_steps_are_told_as_on_the_host(
    on_gpu: Stylizer, on_cpu: Stylizer, cuda: FakeCuda, picture: np.ndarray
) -> None:
    def told(stylizer: Stylizer) -> list[tuple[int, int, Any]]:
        seen: list[tuple[int, int, Any]] = []
        stylizer.stylize(picture, **LARGE, on_step=lambda *step: seen.append(step))
        return seen

    for found, expected in zip(told(on_gpu), told(on_cpu), strict=True):
        assert found[:2] == expected[:2]
        # Looked at after the end: each still shows its own step.
        assert np.abs(np.asarray(found[2]()).astype(int) - np.asarray(expected[2]())).max() <= 1
    cuda.calls.clear()
    on_gpu.stylize(picture, **LARGE, on_step=lambda step, total, preview: None)
    assert cuda.calls.count("download") == 5


def test_a_token_stops_it_within_a_step(on_gpu: Stylizer, picture: np.ndarray) -> None:
    token, seen = CancelToken(), []

    def stop(step: int, total: int, preview: Any) -> None:
        seen.append(step)
        if step == 2:
            token.cancel()

    with pytest.raises(CancelledError):
        on_gpu.stylize(picture, **LARGE, on_step=stop, cancel=token)
    assert seen == [0, 1, 2]
    on_gpu.stylize(picture, **LARGE)


def test_values_that_are_not_finite_are_an_error(
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


def test_styles_stay_on_the_device_up_to_a_budget(
    on_gpu: Stylizer, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.stylize(picture, "vangogh", **LARGE)
    loop = loop_of(on_gpu)
    assert loop is not None
    (first,) = loop.styles.names
    one = loop.styles.bytes
    on_gpu.stylize(picture, "monet", **LARGE)
    on_gpu.stylize(picture, "vangogh", **LARGE)
    assert len(loop.styles.names) == 2
    assert loop.styles.names[-1] == first
    monkeypatch.setattr(on_device, "STYLE_MEMORY", 2 * one)
    on_gpu.stylize(picture, "vangogh:0.5+monet", **LARGE)
    assert len(loop.styles.names) == 2
    assert first in loop.styles.names


def test_without_its_engine_the_steps_are_the_hosts_and_it_says_so(
    trt: FakeTrt, bundle_path: Path, on_cpu: Stylizer, picture: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    (engine_folder(bundle_path, "tensorrt", "fp32") / "advance.engine").unlink()
    with lsast.load(bundle_path, "tensorrt") as stylizer, caplog.at_level(logging.WARNING, "lsast.runtime"):
        alike(stylizer.stylize(picture, **LARGE), on_cpu.stylize(picture, **LARGE))
        assert loop_of(stylizer) is None
    assert "the solver's steps are taken on the host: found no engine" in caplog.text
    assert "--build" in caplog.text


def test_in_eight_bits_is_the_denoiser_alone_and_nothing_takes_its_place(
    bundle_path: Path, trt: FakeTrt, on_cpu: Stylizer, picture: np.ndarray
) -> None:
    with pytest.raises(BackendError, match=r"tensorrt-rtx.int8.*\n.*compile") as told:  # there are those in fp32
        lsast.load(bundle_path, "tensorrt-rtx", arithmetic="int8")
    assert "lsast-export compile" in str(told.value)
    bundle = Bundle.open(bundle_path)
    folder = engine_folder(bundle_path, "tensorrt-rtx", "int8")
    for name in EVERY:
        path, spec = bundle.graph_path(name), bundle.manifest.graphs[name]
        write_engine(path, spec, folder, "tensorrt-rtx", RANGES, "fp16")
    write_engine(ADVANCE_GRAPH, advance_spec(), folder, "tensorrt-rtx", RANGES, "fp32")
    with pytest.raises(BackendError, match="arithmetic: found fp16; expected int8") as told:
        lsast.load(bundle_path, "tensorrt-rtx", arithmetic="int8")
    assert f"lsast-export modelopt QUANTISED {bundle_path} --to int8" in str(told.value)
    path, spec = bundle.graph_path("denoiser"), bundle.manifest.graphs["denoiser"]
    write_engine(path, spec, folder, "tensorrt-rtx", RANGES, "int8", quantised="0" * 64)
    with lsast.load(bundle_path, "tensorrt-rtx", arithmetic="int8") as stylizer:
        painted = stylizer.stylize(picture, **LARGE)
    alike(painted, on_cpu.stylize(picture, **LARGE))  # the fake computes in float32
    assert painted.provenance.arithmetic == "int8"
