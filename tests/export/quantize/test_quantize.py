import collections
import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import lsast
from graph_runs import run_graph
from lsast_engines.backends.onnxruntime import OnnxRuntimeEngine
from lsast_engines.backends.openvino import compute_dtypes
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import GraphSpec, TensorSpec
from lsast_engines.errors import BackendError, ParityError, TrainingError, UsageError
from lsast_engines.images import psnr
from lsast_export.bundle.check import INT8_MARGIN, check_bundle
from lsast_export.cli.main import main
from lsast_export.quantize.calibration import Calibration
from lsast_export.quantize.options import QuantizeOptions
from lsast_export.quantize.paintings import load_calibration_images
from lsast_export.quantize.quantize import PICTURE_PSNR, quantize_bundle
from lsast_export.quantize.weights import NAME, WeightFile, fold_weights
from lsast_export.tensorrt.compile import CompileOptions, compile_bundle
from lsast_train.base.lazy_base import load_base

SMALL = {"pictures": 1, "size": 64, "target": 5.0}


@pytest.fixture(scope="module")
def quantized(bundles: dict[str, Bundle], tmp_path_factory: Any) -> Bundle:
    return quantize_bundle(bundles["fp16"], tmp_path_factory.mktemp("quantized") / "int8", QuantizeOptions(**SMALL))


SPEC = GraphSpec(
    "toy", (TensorSpec("x", "float32", ("B", 16, "h", "w")),), (TensorSpec("y", "float32", ("B", "h", "w", 32)),)
)


def save_graph(path: Path, text: str, **shapes: tuple[int, ...]) -> Path:
    """Write the graph `text` (onnx.parser) with random weights of these shapes."""
    rng = np.random.default_rng(3)
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 18]> ' + text)
    for name, shape in shapes.items():
        array = (rng.standard_normal(shape) / np.sqrt(shape[-1] * 3)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def toy(folder: Path) -> Path:
    """A 3x3 convolution, SiLU, a 3x3 convolution; tanh; then, for each cell, a gate: Split(x W + b), a * sigmoid(g)."""
    text = """toy (float[B, 16, h, w] x) => (float[B, h, w, 32] y) {
        [conv1] a = Conv <pads = [1, 1, 1, 1]> (x, first, first_bias)
        s = Sigmoid (a)
        silu = Mul (a, s)
        [conv2] c = Conv <pads = [1, 1, 1, 1]> (silu, second, second_bias)
        cells = Transpose <perm = [0, 2, 3, 1]> (c)
        bent = Tanh (cells)
        turned = Transpose <perm = [1, 0]> (linear)
        [linear] product = MatMul (bent, turned)
        both = Add (product, linear_bias)
        value, gate = Split <axis = -1, num_outputs = 2> (both)
        open = Sigmoid (gate)
        y = Mul (value, open)
    }"""
    shapes = {"first": (32, 16, 3, 3), "first_bias": (32,), "second": (32, 32, 3, 3), "second_bias": (32,)}
    return save_graph(folder / "toy.onnx", text, **shapes, linear=(64, 32), linear_bias=(64,))


def draw(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [{"x": rng.standard_normal((1, 16, 8, 8)).astype(np.float32)} for _ in range(count)]


def calibrated(
    path: Path, feeds: list[dict[str, np.ndarray]], spec: GraphSpec = SPEC, folder: Path | None = None
) -> Calibration:
    (folder := folder or path.parent / "calibration").mkdir()
    calibration = Calibration(path, spec, folder)
    for given in feeds:
        calibration(given)
    return calibration


def saved(model: Any, folder: Path) -> Path:
    """A graph whose weights lie in `folder`, as a file."""
    onnx.save(model, folder / "saved.onnx")
    return folder / "saved.onnx"


def in_int8(calibration: Calibration) -> Path:
    return saved(calibration.quantized([]), calibration.folder)


def kinds(model: Any) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def folded(path: Path, folder: Path) -> Path:
    """The folded graph of `path`, as a file in `folder`."""
    (folder := folder / "folded").mkdir()
    with (folder / NAME).open("wb") as file:
        return saved(fold_weights(path, WeightFile(file)), folder)


def test_fold_weights_keeps_a_split_with_another_reader(tmp_path):
    model = onnx.load(toy(tmp_path))
    model.graph.output.append(helper.make_tensor_value_info("both", TensorProto.FLOAT, ["B", "h", "w", 64]))
    onnx.save(model, tmp_path / "read.onnx")
    (feeds,) = draw(1)
    plain = folded(tmp_path / "read.onnx", tmp_path)
    found = run_graph(plain, feeds)
    for name, expected in run_graph(tmp_path / "read.onnx", feeds).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5)


def test_int8_graph_runs_in_int8_on_onnx_runtime(tmp_path, monkeypatch):
    calibration = calibrated(toy(tmp_path), draw(4))
    assert calibration.layers == ["conv1", "conv2", "linear/half0", "linear/half1"]
    path = in_int8(calibration)

    class Options(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.optimized_model_filepath = str(tmp_path / "optimised.onnx")

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    open_engine(path, SPEC, "onnxruntime", "cpu").close()
    found = kinds(onnx.load(tmp_path / "optimised.onnx"))
    assert found["QLinearConv"] == 2, found
    assert found["MatMulIntegerToFloat"] == 2, found
    assert not found["Conv"] + found["MatMul"] + found["FusedConv"]


def test_int8_graph_runs_in_int8_on_openvino(tmp_path):
    path = in_int8(calibrated(toy(tmp_path), draw(4)))
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = collections.defaultdict(set)
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        found[str(facts["layerType"].astype(str))].add(str(facts["runtimePrecision"].astype(str)))
    assert {*found["Convolution"]} <= {"u8", "i8"}, dict(found)
    products = {kind for name, kinds in found.items() if name.startswith("FullyConnected") for kind in kinds}
    assert products <= {"u8", "i8"}, dict(found)
    assert found["Convolution"]
    assert products


def test_int8_graph_has_the_numbers_of_onnx_runtimes_quantizer(tmp_path):
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    path = toy(tmp_path)
    plain = onnx.shape_inference.infer_shapes(onnx.load(folded(path, tmp_path)))
    onnx.save(plain, tmp_path / "plain.onnx")
    calibrator = create_calibrator(tmp_path / "plain.onnx", ["Conv", "MatMul"], str(tmp_path / "augmented.onnx"),
                                   CalibrationMethod.MinMax)  # fmt: skip
    calibrator.collect_data(Reader(draw(4)))
    quantizer = QDQQuantizer(
        plain, per_channel=True, reduce_range=False, weight_qType=QuantType.QInt8, activation_qType=QuantType.QUInt8,
        tensors_range=calibrator.compute_data(), nodes_to_quantize=[], nodes_to_exclude=[],
        op_types_to_quantize=["Conv", "MatMul"],
        extra_options={
            "MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"],
            "QDQOpTypePerChannelSupportToAxis": {"Conv": 0, "MatMul": 1},
            "TensorQuantOverrides": {"bent": [{"quant_type": QuantType.QInt8, "symmetric": True}]},
        },
    )  # fmt: skip
    quantizer.quantize_model()
    theirs = quantizer.model.model
    ours = in_int8(calibrated(path, draw(4)))
    onnx.save(theirs, tmp_path / "theirs.onnx")

    def numbers(model: Any) -> list[bytes]:
        tensors = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
        return sorted(array.tobytes() for array in tensors if array.dtype in (np.int8, np.int32) and array.any())

    assert numbers(onnx.load(ours)) == numbers(theirs)
    (feeds,) = draw(1)
    # Not optimized, ONNX Runtime quantizes and multiplies in float32.
    found, expected = (run_graph(path, feeds, optimize=False)["y"] for path in (ours, tmp_path / "theirs.onnx"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_int8_engine_multiplies_without_overflow_on_any_processor(tmp_path):
    """Fused products are off by roundings; on AVX2 without VNNI, sums in 16 bits made it four times as much."""
    path = toy(tmp_path)
    ours = in_int8(calibrated(path, draw(4)))
    (feeds,) = draw(1)
    expected = run_graph(ours, feeds, optimize=False)["y"]
    with contextlib.closing(OnnxRuntimeEngine(ours, SPEC, "cpu", 1)) as engine:
        found = engine(feeds)["y"]
    assert (found - expected).std() < 0.5 * (run_graph(path, feeds)["y"] - expected).std()


def test_int8_graph_keeps_a_bias_larger_than_its_weights(tmp_path):
    model = onnx.load(toy(tmp_path))
    for tensor in model.graph.initializer:
        if tensor.name == "second":
            array = numpy_helper.to_array(tensor).copy()
            array[:4], array[4:8] = 0, array[4:8] * 1e-12
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path := tmp_path / "light.onnx")
    quantized = onnx.load(in_int8(calibrated(path, draw(4))))
    tensors = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in (*quantized.graph.initializer, *model.graph.initializer)
    }
    kept = tensors["conv2/bias/int8"] * tensors["conv2/bias/scale"]
    np.testing.assert_allclose(kept, tensors["second_bias"], atol=5e-4)
    np.testing.assert_allclose(kept[:8], tensors["second_bias"][:8], rtol=1e-6)


def test_weight_file_stores_equal_weights_of_two_graphs_once(tmp_path):
    path = toy(tmp_path)
    sizes = []
    for names in (["one.onnx"], ["one.onnx", "two.onnx"]):
        (folder := tmp_path / str(len(names))).mkdir()
        with (folder / NAME).open("wb") as file:
            weights = WeightFile(file)
            for name in names:
                weights.save(onnx.load(path), tmp_path, name)
        sizes.append((folder / NAME).stat().st_size)
        (feeds,) = draw(1)
        np.testing.assert_array_equal(run_graph(folder / names[-1], feeds)["y"], run_graph(path, feeds)["y"])
    assert sizes[0] == sizes[1] > 32 * 32 * 9 * 4


def test_quantize_bundle_keeps_styles_and_fingerprint(quantized, bundles):
    source = bundles["fp16"]
    manifest = quantized.manifest
    assert manifest.fingerprint == source.manifest.fingerprint
    assert manifest.source["quantized_from"] == f"{source.manifest.name} (fp16)"
    assert "1 pictures (drawn) at 64 pixels" in manifest.source["calibrated_on"]
    assert list(quantized.styles()) == ["hand"]
    quantized.style("hand")
    assert "base.safetensors" not in manifest.files
    assert manifest.parity[PICTURE_PSNR] >= 5
    assert (quantized.path / "weights.data").stat().st_size < (source.path / "base.safetensors").stat().st_size
    report = check_bundle(quantized.path, "onnxruntime")
    assert report.passed
    assert report.styles == ("hand",)
    assert report.recorded == manifest.parity


def test_quantized_bundle_cannot_be_quantized_loaded_or_compiled(quantized, tmp_path):
    with pytest.raises(UsageError, match="expected the one that it was made from"):
        quantize_bundle(quantized, tmp_path / "again", QuantizeOptions(**SMALL))
    with pytest.raises(TrainingError, match="name the bundle that it was made from"):
        load_base(quantized.path)
    with pytest.raises(UsageError, match=r"quantized for CPUs.*mini \(fp16\)"):
        compile_bundle(quantized.path, CompileOptions("tensorrt-rtx"), tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def test_quantize_bundle_to_its_own_folder_is_refused(bundles, tmp_path):
    source = bundles["fp32"].path
    (link := tmp_path / "link").symlink_to(source)
    for out in (source, link, source / "styles" / ".."):
        with pytest.raises(UsageError, match="found the folder of the bundle itself"):
            quantize_bundle(bundles["fp32"], out, QuantizeOptions(**SMALL), lambda phase: pytest.fail(phase))


def test_quantize_bundle_takes_its_own_style_where_the_user_has_one_of_that_name(bundles, monkeypatch, tmp_path):
    source = Bundle.open(bundles["fp32"].path)
    shutil.copytree(source.path / "styles", source.user_style_folder)
    painted: list[Path] = []

    def paint(bundle: Bundle, _: object, styles: list[str], *__: object, **___: object) -> None:
        painted.extend(bundle.open_style(name).path for name in styles)
        raise ParityError

    monkeypatch.setattr("lsast_export.quantize.quantize.paint", paint)
    with pytest.raises(ParityError):
        quantize_bundle(source, tmp_path / "out", QuantizeOptions(**SMALL))
    assert painted == [source.path / "styles" / "hand.safetensors"]
    assert source.styles()["hand"].parent == source.user_style_folder


def test_quantize_bundle_below_the_target_writes_nothing(bundles, tmp_path):
    options = QuantizeOptions(pictures=1, size=64, target=500)
    with pytest.raises(ParityError, match="expected 500"):
        quantize_bundle(bundles["fp32"], tmp_path / "out", options)
    assert not list(tmp_path.glob("*out*"))


def test_quantize_bundle_with_also_quantizes_the_autoencoder(bundles, tmp_path):
    source = bundles["fp16"]
    options = QuantizeOptions(**SMALL, also=frozenset({"vae_encoder", "vae_decoder"}))
    also = quantize_bundle(source, tmp_path / "also", options)
    rng = np.random.default_rng(6)
    fed = {
        "vae_encoder": {"image": rng.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)},
        "vae_decoder": {"latent": rng.standard_normal((1, 4, 8, 8)).astype(np.float32)},
    }
    for name, feeds in fed.items():
        rounded = kinds(onnx.load(str(also.graph_path(name)), load_external_data=False))
        kept, _, layers, _ = also.manifest.source[f"{name}_in_float"].split()
        assert rounded["QuantizeLinear"] >= int(layers) - int(kept) > 0
        spec = source.manifest.graphs[name]
        exact = open_engine(source.graph_path(name), spec, "onnxruntime", "cpu")(feeds)[spec.outputs[0].name].copy()
        ways = [("onnxruntime", "fp32"), *([("openvino", "bf16")] if "bf16" in compute_dtypes("cpu") else [])]
        for backend, dtype in ways:
            engine = open_engine(also.graph_path(name), spec, backend, "cpu", compute_dtype=dtype)  # type: ignore[arg-type]
            assert 0 < error(engine(feeds)[spec.outputs[0].name], exact) < 0.2, backend
    assert also.manifest.parity[PICTURE_PSNR] >= SMALL["target"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pictures": 0, "size": 65, "smooth": 1.5, "also": frozenset({"controlnet_cond"})},
            r"pictures: found 0; .*smooth: found 1.5; .*size: found 65; .*also controlnet_cond",
        ),
        ({"size": "64", "target": np.nan}, r"size: found '64'; .*target: found nan"),
        # whole numbers of NumPy are fine, so there is no other fault
        ({"pictures": np.int64(0), "size": np.int64(64), "target": np.float32(5)}, r"pictures: found 0; [^:]*$"),
    ],
)
def test_quantize_bundle_lists_all_faults_of_options(bundles, tmp_path, options, message):
    with pytest.raises(UsageError, match=f"(?s){message}"):
        quantize_bundle(bundles["fp32"], tmp_path / "out", QuantizeOptions(**options))


def test_quantize_command_calibrates_on_a_folder(bundles, tmp_path):
    (photos := tmp_path / "photos").mkdir()
    for index in range(2):
        picture = np.random.default_rng(index).integers(0, 256, (40, 90 + index, 3)).astype(np.uint8)
        cv2.imwrite(str(photos / f"{index}.png"), picture)
    arguments = ["quantise", str(bundles["fp32"].path), "--out", str(tmp_path / "out"), "--images", str(photos),
                 "--pictures", "1", "--size", "64", "--target", "5", "--json"]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["storage_dtype"] == "int8"
    assert "(photos)" in facts["source"]["calibrated_on"]
    assert facts["parity"] == Bundle.open(tmp_path / "out").manifest.parity
    result = CliRunner().invoke(main, [*arguments, "--pictures", "2"])
    assert result.exit_code == 2
    assert "found 2 pictures" in result.output
    result = CliRunner().invoke(main, [*arguments, "--precision", "int8-weights"])
    assert result.exit_code == 2
    assert "int8-weights was removed: for less memory export in fp16" in result.output


def test_psnr_is_opencvs():
    rng = np.random.default_rng(1)
    one, other = (rng.integers(0, 256, (9, 7, 3)).astype(np.uint8) for _ in range(2))
    assert psnr(one, other) == pytest.approx(cv2.PSNR(one, other), rel=1e-6)
    assert psnr(one, one) == float("inf")


def test_quantized_bundle_in_bf16_paints_as_near_to_float_as_in_fp32(quantized, bundles):
    with pytest.raises(UsageError, match=r"found compute_dtype fp16.*expected fp32, or bf16"):
        lsast.load(quantized.path, compute_dtype="fp16")
    with pytest.raises(BackendError, match=r"onnxruntime computes in fp32 on cpu, others may in bf16"):
        lsast.load(quantized.path, backend="onnxruntime", compute_dtype="bf16")
    if "bf16" not in compute_dtypes("cpu"):
        pytest.skip("OpenVINO has no bf16 here")
    picture = load_calibration_images(None, 1, 128)[0][0]
    painted = []
    for bundle, backend, dtype in (
        (bundles["fp16"], "onnxruntime", "fp32"), (quantized, "onnxruntime", "fp32"), (quantized, "openvino", "bf16"),
    ):  # fmt: skip
        with lsast.load(bundle.path, backend=backend, compute_dtype=dtype, threads=1) as stylizer:
            painted.append(
                [np.asarray(stylizer.stylize(picture, size=size, steps=4, seed=2).image) for size in (64, 128)]
            )
    for exact, fp32, bf16 in zip(*painted, strict=True):
        assert psnr(exact, bf16) >= psnr(exact, fp32) - 1.5


def test_check_bundle_holds_auto_in_int8_to_the_same_backend_in_fp32(quantized, monkeypatch):
    monkeypatch.setenv("LSAST_PROCESSOR", "avx512_bf16")
    if "bf16" not in compute_dtypes("cpu"):
        pytest.skip("OpenVINO has no bf16 here")
    report = check_bundle(quantized.path)
    assert (report.auto.compute_dtype, report.passed) == ("bf16", True)
    assert report.auto_expected + INT8_MARGIN == pytest.approx(report.auto_psnr, abs=3)
    assert not dataclasses.replace(report, auto_psnr=report.auto_expected - 0.1).passed


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_quantize_command_on_the_embedded_bundle_meets_the_target(backend, tmp_path):
    arguments = ["quantise", "--out", str(tmp_path / "mini"), "--backend", backend, "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["parity"][PICTURE_PSNR] >= 30
    picture = load_calibration_images(None, 9, 256)[0][8]
    for style in ("vangogh", "koson"):
        pictures = []
        for bundle in (tmp_path / "mini", None):
            with lsast.load(bundle, backend=backend) as stylizer:
                pictures.append(np.asarray(stylizer.stylize(picture, style=style, size=256, seed=3).image))
        assert psnr(*pictures) >= 30, style
