"""The denoiser in 8 bits by ModelOpt: what goes in and comes out, by a stand-in, and by itself where it is there."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper
from PIL import Image

from lsast_engines.bundle import Bundle
from lsast_engines.engine import open_engine
from lsast_engines.errors import ExportError, MissingExtraError, UsageError
from lsast_engines.profile import Ranges, Span
from lsast_export import eight_bit
from lsast_export.__main__ import main
from lsast_export.eight_bit import calibration_feeds, quality, quantise_denoiser, take_scalar
from lsast_export.half_graph import held_types
from lsast_export.tensorrt import CompileOptions, compile_graph
from lsast_export.trial import Pixels, find_contents, psnr
from lsast_export.triton import one_element

SIDE = 64


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        coarse.resize((120, 80), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def contents(photos: Path) -> list[Pixels]:
    return find_contents(photos, 3, SIDE)[0]


def rounding(source: str, output_path: str, calibration_data: dict[str, np.ndarray], **settings: Any) -> None:
    """In ModelOpt's place: the latent goes through 8 bits, with a scale that the calibration data give."""
    model = onnx.load(source)
    scale = np.float32(np.abs(calibration_data["latent"]).max() / 127)
    for node in model.graph.node:
        for index, value in enumerate(node.input):
            if value == "latent":
                node.input[index] = "latent/dequantised"
    model.graph.initializer.extend(
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    )
    pair = [
        helper.make_node("QuantizeLinear", ["latent", "scale", "zero"], ["latent/quantised"]),
        helper.make_node("DequantizeLinear", ["latent/quantised", "scale", "zero"], ["latent/dequantised"]),
    ]
    nodes = [*pair, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, output_path)


def test_it_is_calibrated_on_steps_of_the_pictures_and_opens_as_the_denoiser(
    bundles: dict[str, Bundle], contents: list[Pixels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def quantize(source: str, **settings: Any) -> None:
        seen.update(settings)
        graph = onnx.load(source).graph
        # What ModelOpt stumbles over is gone: scalars, and casts behind weights.
        assert all(len(border.type.tensor_type.shape.dim) for border in graph.input)
        weights = {tensor.name for tensor in graph.initializer}
        assert not any(node.op_type == "Cast" and node.input[0] in weights for node in graph.node)
        rounding(source, **settings)

    monkeypatch.setattr(eight_bit, "_modelopt", lambda: quantize)
    bundle = bundles["fp16"]
    file = quantise_denoiser(bundle, contents, "int8", tmp_path / "out" / "denoiser.onnx")
    assert seen["quantize_mode"] == "int8"
    data = seen["calibration_data"]
    thirds = data["timestep"] * 3 // bundle.manifest.noise.train_steps
    assert thirds.tolist() == [0, 1, 2]
    assert data["latent"].shape == (3, 4, 8, 8)
    assert data["kv_unet"].shape[:2] == (3 * 2, 1)
    assert "control_scale:1" in seen["calibration_shapes"].split(",")
    onnx.checker.check_model(str(file), full_check=True)
    cost = quality(bundle, file, contents)
    # A value of 8 bits is off by up to half a step of 1/127 of the largest: 20 log10(127 sqrt(12)) = 52.9 dB, less
    # where other latents are larger than those of the calibration.
    assert 25 < cost.noise < 75
    assert all(math.isfinite(value) for value in cost)


def test_smoothing_changes_weights_and_nothing_that_is_computed(
    bundles: dict[str, Bundle],
    contents: list[Pixels],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    feeds: Callable[..., dict[str, np.ndarray]],
) -> None:
    seen: list[dict[str, np.ndarray]] = []

    def quantize(source: str, **settings: Any) -> None:
        seen.append({tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(source).graph.initializer})
        # The ends of the network and its time path stay in float.
        nodes = {node.name: node for node in onnx.load(source).graph.node}
        kept = [node for name, node in nodes.items() if any(re.match(p, name) for p in settings["nodes_to_exclude"])]
        assert len(kept) == len(settings["nodes_to_exclude"]) >= 6
        assert {node.op_type for node in kept} == {"Conv", "Gemm"}
        rounding(source, **settings)

    monkeypatch.setattr(eight_bit, "_modelopt", lambda: quantize)
    bundle, found = bundles["fp16"], []
    for smooth in (None, 0.5):
        file = quantise_denoiser(bundle, contents, "int8", tmp_path / str(smooth) / "denoiser.onnx", smooth=smooth)
        with closing(open_engine(file, bundle.manifest.graphs["denoiser"], "onnxruntime", threads=1)) as engine:
            found.append(engine(feeds(bundle, 1, 2, 8, 8))["eps"].copy())
    plain, smoothed = seen
    assert sum(not np.array_equal(plain[name], smoothed[name]) for name in plain) >= 4
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4 * np.abs(found[0]).max())


def test_what_was_not_quantised_is_an_error(
    bundles: dict[str, Bundle], contents: list[Pixels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def idle(source: str, output_path: str, **settings: Any) -> None:
        onnx.save(onnx.load(source), output_path)

    def failing(source: str, **settings: Any) -> None:
        raise IndexError("list index out of range")

    for quantize, message in ((idle, "ModelOpt quantised nothing"), (failing, "ModelOpt cannot quantise .*index out")):
        monkeypatch.setattr(eight_bit, "_modelopt", lambda quantize=quantize: quantize)
        with pytest.raises(ExportError, match=message):
            quantise_denoiser(bundles["fp16"], contents, "int8", tmp_path / "out.onnx")
        assert not (tmp_path / "out.onnx").exists()
    with pytest.raises(UsageError, match="found 0 pictures and 1 styles to calibrate on"):
        quantise_denoiser(bundles["fp16"], [], "int8", tmp_path / "out.onnx")


def test_a_scalar_goes_to_one_element_and_back(
    bundles: dict[str, Bundle], tmp_path: Path, feeds: Callable[..., dict[str, np.ndarray]], run: Any
) -> None:
    bundle = bundles["fp32"]
    model = onnx.load(bundle.graph_path("denoiser"))
    one_element(model, "control_scale")
    take_scalar(model, "control_scale")
    onnx.save(model, tmp_path / "denoiser.onnx", save_as_external_data=True)
    inputs = feeds(bundle, 1, 2, 8, 8)
    engine = open_engine(tmp_path / "denoiser.onnx", bundle.manifest.graphs["denoiser"], "onnxruntime", threads=1)
    found = engine(inputs)["eps"].copy()
    engine.close()
    np.testing.assert_allclose(found, run(bundle, "denoiser", **inputs)["eps"], rtol=1e-5, atol=1e-5)


def test_psnr_is_the_formula() -> None:
    assert psnr(np.zeros(4), np.full(4, 0.1), 1.0) == pytest.approx(20.0)
    assert psnr(np.zeros(4, np.uint8), np.full(4, 255, np.uint8)) == 0
    assert psnr(np.ones(3), np.ones(3), 2.0) == math.inf


def test_styles_with_guidance_baked_in_are_not_mixed_with_those_that_need_it(
    bundles: dict[str, Bundle], contents: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles["fp16"]
    ((name, path),) = bundle.styles().items()
    opened = {"baked": bundle.open_style(name), "plain": bundle.open_style(name)}
    opened["baked"].guidance_baked = 7.0
    monkeypatch.setattr(Bundle, "styles", lambda _: {"baked": path, "plain": path})
    monkeypatch.setattr(Bundle, "open_style", lambda _, name: opened[name])
    feeds = calibration_feeds(bundle, contents)
    assert len(feeds) == 1  # the second of three, in the styles by turns
    assert {len(each["kv_unet"]) for each in feeds} == {2}


def test_without_modelopt_it_is_one_line(
    bundles: dict[str, Bundle], contents: list[Pixels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(MissingExtraError, match=r"nvidia-modelopt is not installed.*lsast\[modelopt\]"):
        quantise_denoiser(bundles["fp16"], contents, "fp8", tmp_path / "out.onnx")


def test_fp8_is_refused_for_gpus_without_it_before_anything_is_done(photos: Path, tmp_path: Path) -> None:
    arguments = ["modelopt", str(tmp_path / "out"), "--to", "fp8", "--images", str(photos), "--sm", "8.6,8.9"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "8.6: found FLOAT8E4M3FN in fp8 denoiser; expected compute capability 8.9" in result.stderr
    assert "8.9: found" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "smooth"),
    [(["int8"], 0.5), (["int8", "--no-smooth"], None), (["fp8"], None), (["fp8", "--smooth", "0.3"], 0.3)],
)
def test_int8_is_smoothed_if_nothing_is_said(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], smooth: float | None
) -> None:
    seen: list[Any] = []

    def quantise(*given: Any) -> None:
        seen.append(given[-1])
        raise ExportError("enough")

    monkeypatch.setattr(eight_bit, "quantise_denoiser", quantise)
    command = ["modelopt", str(tmp_path / "out"), "--images", str(photos), "--count", "1", "--to", *arguments]
    assert "enough" in CliRunner().invoke(main, command).stderr
    assert seen == [smooth]
    refused = CliRunner().invoke(main, [*command, "--smooth", "0.1", "--no-smooth"])
    assert "found --smooth and --no-smooth" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stored"), [("int8", "INT8"), ("fp8", "FLOAT8E4M3FN")])
def test_modelopt_itself(
    bundles: dict[str, Bundle], contents: list[Pixels], tmp_path: Path, kind: Any, stored: str
) -> None:
    """Quantised, run by ONNX Runtime, compiled by TensorRT-RTX; fp8 also refused where no GPU has it."""
    pytest.importorskip("modelopt.onnx.quantization", reason="not installed: pip install 'lsast[modelopt]'")
    bundle = bundles["fp16"]
    file = quantise_denoiser(bundle, contents, kind, tmp_path / "out" / "denoiser.onnx")
    assert stored in held_types(file)
    cost = quality(bundle, file, contents)
    assert 15 < cost.noise < 80
    assert 10 < cost.picture < 80
    pytest.importorskip("tensorrt_rtx", reason="not installed: pip install 'lsast[tensorrt-rtx]'")
    spec = bundle.manifest.graphs["denoiser"]
    options = CompileOptions("tensorrt-rtx", ("8.9",), Ranges(Span(64, 64, 128)), "fp32")
    assert compile_graph(file, spec, tmp_path / "denoiser.engine", options).bytes > 0
    if kind == "fp8":
        options = CompileOptions("tensorrt-rtx", ("8.6",), Ranges(Span(64, 64, 128)), "fp32")
        with pytest.raises(ExportError, match=r"8\.6: found FLOAT8E4M3FN"):
            compile_graph(file, spec, tmp_path / "denoiser.engine", options)
