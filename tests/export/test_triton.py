"""The model repository for Triton: what its own schema, ONNX and ONNX Runtime say of it. No server runs here."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from lsast_engines.bundle import EMBEDDED, Bundle
from lsast_engines.engine import open_engine
from lsast_engines.errors import ExportError, UsageError
from lsast_engines.profile import Ranges, Span
from lsast_engines.spec import DENOISER
from lsast_export import triton
from lsast_export.__main__ import main
from lsast_export.tensorrt import CompileOptions, compile_graph
from lsast_export.triton import served_spec, write_repository

GRAPHS = ("encoder", "hint", "denoiser", "decoder")


@pytest.fixture
def schema() -> Any:
    """The messages of `model_config.proto` as Triton's client publishes them; its file needs protobuf alone."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient is not installed: pip install '.[dev]'")
    path = Path(found.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    # By its path: the package around it imports grpc.
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(bundles: dict[str, Bundle], tmp_path: Path) -> dict[str, Path]:
    return write_repository(bundles["fp16"].path, tmp_path / "models")


def test_every_config_is_one_by_the_public_schema(
    schema: Any, repository: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    from google.protobuf import text_format

    manifest = bundles["fp16"].manifest
    assert repository.keys() == manifest.graphs.keys()
    types = {"float32": schema.TYPE_FP32, "int64": schema.TYPE_INT64}
    for name, model in repository.items():
        config = text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())
        assert config.name == model.name
        assert (config.backend, config.platform, config.max_batch_size) == ("onnxruntime", "onnxruntime_onnx", 0)
        assert config.parameters["base_fingerprint"].string_value == manifest.fingerprint
        spec = manifest.graphs[name]
        for found, wanted in ((config.input, spec.inputs), (config.output, spec.outputs)):
            assert [(tensor.name, tensor.data_type) for tensor in found] == [
                (tensor.name, types[tensor.dtype]) for tensor in wanted
            ]
            # Triton refuses a tensor without dims, so that a scalar is one of [1].
            for tensor, expected in zip(found, wanted, strict=True):
                axes = [axis if isinstance(axis, int) else -1 for axis in expected.shape]
                assert list(tensor.dims) == (axes or [1])


def test_a_name_of_any_characters_is_one_string(schema: Any, bundles: dict[str, Bundle]) -> None:
    from google.protobuf import text_format

    spec = served_spec(bundles["fp16"].manifest.graphs["denoiser"])
    name = 'a "quoted\\ name\nof two lines'
    text = triton.config_text(name, spec, "tensorrt", {"key": name})
    config = text_format.Parse(text, schema.ModelConfig())
    assert config.name == config.parameters["key"].string_value == name
    assert config.platform == "tensorrt_plan"


@pytest.mark.parametrize("graph", GRAPHS)
def test_served_graphs_compute_what_the_bundle_does(
    repository: dict[str, Path],
    bundles: dict[str, Bundle],
    graph: str,
    feeds: Callable[..., dict[str, np.ndarray]],
    run: Callable[..., dict[str, np.ndarray]],
) -> None:
    bundle = bundles["fp16"]
    path = repository[graph] / "1" / "model.onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    rng = np.random.default_rng(0)
    inputs = {
        "denoiser": feeds(bundle, 2, 2, 8, 8),
        "decoder": {"latent": rng.standard_normal((1, 4, 8, 8), dtype=np.float32)},
        "encoder": {"image": rng.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)},
        "hint": {"edges": rng.integers(0, 2, (1, 3, 64, 64)).astype(np.float32)},
    }[graph]
    expected = run(bundle, graph, **inputs)
    served = {name: np.atleast_1d(value) for name, value in inputs.items()}
    engine = open_engine(path, served_spec(bundle.manifest.graphs[graph]), "onnxruntime", threads=1)
    for name, value in engine(served).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5)
    engine.close()


def test_every_model_holds_its_own_weights_and_no_more(repository: dict[str, Path], bundles: dict[str, Bundle]) -> None:
    files = {name: model / "1" / "model.onnx" / f"{name}.data" for name, model in repository.items()}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    # 64 bytes at most are lost before each weight; nothing is there twice.
    whole = (bundles["fp16"].path / "base.safetensors").stat().st_size
    assert 0 < sum(sizes.values()) < whole + 64 * 1000
    for name, file in files.items():
        onnx_file = onnx.load(file.with_name("model.onnx"))
        held = sum(len(weight.raw_data) for weight in onnx_file.graph.initializer)
        assert sizes[name] <= held + 64 * len(onnx_file.graph.initializer)


def test_models_that_are_there_are_never_touched(repository: dict[str, Path], bundles: dict[str, Bundle]) -> None:
    folder = repository["hint"].parent
    (folder / "another" / "1").mkdir(parents=True)
    with pytest.raises(UsageError, match="found models there already") as caught:
        write_repository(bundles["fp16"].path, folder)
    assert all(str(model) in str(caught.value) for model in repository.values())
    assert {path.name for path in folder.iterdir()} == {"another", *(model.name for model in repository.values())}


def test_engines_are_compiled_from_the_served_graphs(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT cannot be installed here: what it would be asked is checked."""
    asked: dict[str, Any] = {}

    def compile_fake(path: Path, spec: Any, engine: Path, options: CompileOptions, progress: Any) -> None:
        border = {value.name: len(value.type.tensor_type.shape.dim) for value in onnx.load(path).graph.input}
        assert border == {tensor.name: len(tensor.shape) for tensor in spec.inputs}
        asked[spec.name] = options
        engine.write_bytes(b"a plan")

    monkeypatch.setattr(triton, "compile_graph", compile_fake)
    options = CompileOptions("tensorrt", ranges=Ranges(Span(64, 64, 128)))
    models = write_repository(bundles["fp16"].path, tmp_path / "models", options)
    assert asked == dict.fromkeys(GRAPHS, options)
    for model in models.values():
        assert sorted(path.name for path in model.rglob("*")) == ["1", "config.pbtxt", "model.plan"]
        assert 'platform: "tensorrt_plan"' in (model / "config.pbtxt").read_text()


def test_a_failed_compile_leaves_no_model(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, spec: Any, *_: object) -> None:
        if spec.name == "decoder":
            raise ExportError("no")

    monkeypatch.setattr(triton, "compile_graph", fail)
    with pytest.raises(ExportError):
        write_repository(bundles["fp16"].path, tmp_path / "models", CompileOptions("tensorrt"))
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.needs("tensorrt_rtx")
def test_the_embedded_denoiser_compiles_as_it_is_served(tmp_path: Path) -> None:
    """By TensorRT-RTX, whose parser and builder are TensorRT's: the scalar of [1] is no obstacle."""
    served = write_repository(EMBEDDED, tmp_path / "models")[DENOISER]
    options = CompileOptions("tensorrt-rtx", ("8.6", "8.9", "12.0"), arithmetic="fp32")
    spec = served_spec(Bundle.open(EMBEDDED).manifest.graphs[DENOISER])
    path = served / "1" / "model.onnx" / "model.onnx"
    assert compile_graph(path, spec, tmp_path / "denoiser.engine", options).bytes > 0


def test_the_command_writes_it(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["fp16"]
    result = CliRunner().invoke(main, ["triton", str(tmp_path / "models"), str(bundle.path), "--json"])
    assert result.exit_code == 0, result.stderr
    models = json.loads(result.stdout)["models"]
    assert models.keys() == set(GRAPHS)
    assert all(Path(model, "config.pbtxt").is_file() for model in models.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sides", "64,64,128", "--arithmetic", "fp16"], "found --sides, --arithmetic; expected --backend tensorrt"),
        (["--backend", "tensorrt-rtx"], "'tensorrt-rtx' is not one of"),
        (["--backend", "tensorrt", "--sm", "8.9"], "it compiles for the GPU that is here only"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["triton", str(tmp_path / "models"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "models").exists()
