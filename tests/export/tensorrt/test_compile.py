"""Engines compiled ahead of time by TensorRT-RTX, on a machine without a GPU: compiled, never run."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from lsast_engines.backends.tensorrt.engine_record import (
    EngineKey,
    Range,
    ShapeRanges,
    engine_folder,
    record_path,
    verified_record,
)
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS, GraphSpec, TensorSpec
from lsast_engines.errors import BackendError, ExportError, MissingExtraError, UsageError
from lsast_export.cli.main import main
from lsast_export.progress import Progress
from lsast_export.tensorrt.compile import CompileOptions, compile_bundle, compile_graph

TARGETS = ("8.6", "8.9", "12.0")
SMALL = ShapeRanges(Range(64, 64, 128), Range(1, 1, 2))
Shape = tuple[str | int, ...]
needs_rtx = pytest.mark.needs("tensorrt_rtx")


def rtx_options(**changes: object) -> CompileOptions:
    return dataclasses.replace(CompileOptions("tensorrt-rtx", TARGETS, SMALL), **changes)


def saved(folder: Path, text: str, weight: onnx.TensorProto, x: Shape, y: Shape) -> tuple[Path, GraphSpec]:
    """The graph `text` (onnx.parser) from x to y with one weight."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    model.graph.initializer.append(weight)
    onnx.save(model, path := folder / "product.onnx")
    return path, GraphSpec("product", (TensorSpec("x", "float32", x),), (TensorSpec("y", "float32", y),))


def product(folder: Path, operator: str = "MatMul (x, W)") -> tuple[Path, GraphSpec]:
    """y = x W, W [8, 16] in fp32, or another operator."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32), "W")
    text = f"product (float[B, 16, 8] x) => (float[B, 16, n] y) {{ y = {operator} }}"
    return saved(folder, text, weight, ("B", 16, 8), ("B", 16, 16))


def bf16_weight(folder: Path) -> tuple[Path, GraphSpec]:
    """y = x W, W [32, 32] stored in bf16."""
    values = np.random.default_rng(1).standard_normal(32 * 32)
    weight = helper.make_tensor("W", onnx.TensorProto.BFLOAT16, (32, 32), values.tolist())
    text = "product (float[B, 32] x) => (float[B, 32] y) { W32 = Cast <to = 1> (W) y = MatMul (x, W32) }"
    return saved(folder, text, weight, ("B", 32), ("B", 32))


def test_compile_graph_without_the_library_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    path, spec = product(tmp_path)
    with pytest.raises(MissingExtraError, match=r"tensorrt-rtx is not installed.*lsast\[tensorrt-rtx\]"):
        compile_graph(path, spec, tmp_path / "product.engine", rtx_options())


@pytest.mark.parametrize(
    ("library", "targets", "message"),
    [
        ("tensorrt", ("8.9",), "it compiles for the GPU that is here only"),
        ("tensorrt-rtx", ("sm89",), "found compute capability sm89; expected one such as 8.9"),
    ],
)
def test_compile_options_refuse_wrong_targets(library, targets, message):
    with pytest.raises(UsageError, match=message):
        CompileOptions(library, targets)  # type: ignore[arg-type]


@needs_rtx
def test_compile_graph_recompiles_only_after_a_change(tmp_path):
    path, spec = product(tmp_path)
    engine = tmp_path / "product.engine"
    said: list[str] = []

    def compile_it(**changes: object) -> int:
        said.clear()
        options = rtx_options(compute_dtype="fp32", **changes)
        compile_graph(path, spec, engine, options, lambda phase, detail="": said.append(detail))
        return engine.stat().st_mtime_ns

    first = compile_it()
    assert "building engine, 0 s" in said
    assert compile_it() == first
    assert said == ["", "up to date"]
    for_another = compile_it(targets=("8.9",))
    assert for_another > first
    assert any("last time" in detail for detail in said)
    engine.write_bytes(engine.read_bytes()[:-1])  # truncated: not there
    assert compile_it(targets=("8.9",)) > for_another
    path.write_bytes(path.read_bytes() + b"\x22\x01x")  # field 4, the domain: another file, the same graph
    before = verified_record(engine).key.onnx
    compile_it(targets=("8.9",))
    assert verified_record(engine).key.onnx != before


@needs_rtx
def test_compile_graph_reports_the_librarys_messages(tmp_path):
    path, spec = product(tmp_path, operator="Bernoulli (x)")
    engine = tmp_path / "product.engine"
    with pytest.raises(ExportError, match=r"(?s)graph product cannot be read:.*Bernoulli"):
        compile_graph(path, spec, engine, rtx_options(compute_dtype="fp32"))
    assert not engine.exists()
    assert not record_path(engine).exists()


@needs_rtx
def test_compile_graph_refuses_another_graph(tmp_path):
    path, spec = product(tmp_path)
    wanted = GraphSpec("product", (TensorSpec("z", "float32", ("B", 16, 8)),), spec.outputs)
    with pytest.raises(ExportError, match="graph product takes x; expected z"):
        compile_graph(path, wanted, tmp_path / "product.engine", rtx_options(compute_dtype="fp32"))


@needs_rtx
def test_compile_graph_lists_known_targets(tmp_path):
    path, spec = product(tmp_path)
    with pytest.raises(UsageError, match=r"found compute capability 9\.0; .*compiles for 7\.5, 8\.6, 8\.9, 12\.0"):
        compile_graph(path, spec, tmp_path / "product.engine", rtx_options(targets=("9.0",)))


@needs_rtx
def test_compile_graph_refuses_bf16_for_old_gpus(tmp_path):
    path, spec = bf16_weight(tmp_path)
    engine = tmp_path / "product.engine"
    with pytest.raises(ExportError, match=r"found bf16 .* 7\.5; expected at least 8\.0") as caught:
        compile_graph(path, spec, engine, rtx_options(compute_dtype="fp32", targets=("7.5", "8.6")))
    assert "8.6" not in str(caught.value)
    assert compile_graph(path, spec, engine, rtx_options(compute_dtype="fp32", targets=("8.6",))).bytes > 0


def test_compile_graph_with_tensorrt_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("lsast_export.tensorrt.compile.load_library", lambda _: None)
    monkeypatch.setattr("lsast_engines.backends.tensorrt.cuda.gpu_fault", lambda: "no driver (35)")
    path, spec = product(tmp_path)
    with pytest.raises(BackendError, match=r"found no NVIDIA GPU \(no driver \(35\)\); tensorrt compiles on"):
        compile_graph(path, spec, tmp_path / "product.engine", CompileOptions("tensorrt"))


@needs_rtx
def test_compile_command_writes_where_the_runtime_looks(tmp_path):
    graphs = ["--graph", "vae_encoder", "--graph", "controlnet_cond"]
    arguments = ["compile", "--backend", "tensorrt-rtx", "--sm", "8.9", *graphs, "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    folder = Path(facts["engines"])
    assert folder.is_relative_to(tmp_path / "home" / "compiled")
    assert folder == engine_folder(EMBEDDED, "tensorrt-rtx", "fp16")
    assert verified_record(folder / "vae_encoder.engine").key.targets == ("8.9",)
    assert facts["graphs"].keys() == {"vae_encoder", "controlnet_cond"}
    assert facts["graphs"]["vae_encoder"]["bytes"] == (folder / "vae_encoder.engine").stat().st_size
    assert facts["graphs"]["vae_encoder"]["activation_bytes"] > 2**20  # at 1024²
    assert facts["activation_bytes"] == facts["graphs"]["vae_encoder"]["activation_bytes"]
    assert "GB while it runs" in result.stderr
    assert "total activation memory up to 1024 pixels" in result.stderr


def test_bake_with_a_tensorrt_backend_compiles_for_the_same_bundle(monkeypatch):
    """From a learned style to engines in one command; what baking and compiling do is tested elsewhere."""
    calls: list[tuple[Path, CompileOptions]] = []

    def compile_nothing(bundle: Path, options: CompileOptions, out: None, progress: Progress, graphs: object) -> object:
        calls.append((bundle, options))
        progress("compiling denoiser")
        return {}

    monkeypatch.setattr("lsast_export.tensorrt.compile.compile_bundle", compile_nothing)
    monkeypatch.setattr("lsast_export.styles.bake.find_distilled", Path)
    monkeypatch.setattr("lsast_export.styles.bake.bake_for_bundle", lambda bundle, prompts, files: {"hand": files[0]})
    result = CliRunner().invoke(main, ["--style", "hand", "--backend", "tensorrt-rtx", "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["styles"] == {"hand": "hand"}
    assert calls == [(EMBEDDED, CompileOptions("tensorrt-rtx"))]
    assert facts["compiled"]["engines"] == str(engine_folder(EMBEDDED, "tensorrt-rtx", "fp16"))


def test_compile_bundle_lists_known_graphs(tmp_path):
    with pytest.raises(
        UsageError, match=r"found graphs decoding; expected of vae_encoder, controlnet_cond, denoiser, vae_decoder"
    ):
        compile_bundle(EMBEDDED, rtx_options(), tmp_path, graphs=["decoding"])


@pytest.mark.parametrize("compute_dtype", ["fp16", "fp32"])
def test_compile_bundle_in_fp16_leaves_the_encoder_in_fp32(tmp_path, monkeypatch, compute_dtype):
    """By the graphs that the library is given."""
    halves: dict[str, bool] = {}

    def build(trt: object, logger: object, source: Path, key: EngineKey, *_: object) -> memoryview:
        results = [value.dtype for node in ir.load(source).graph for value in node.outputs]
        halves[key.graph] = ir.DataType.FLOAT16 in results
        return memoryview(b"engine")

    logger = SimpleNamespace(activation_bytes=0)
    monkeypatch.setattr("lsast_export.tensorrt.compile.make_logger", lambda _: logger)
    monkeypatch.setattr("lsast_export.tensorrt.compile.load_library", lambda _: SimpleNamespace(__version__="1"))
    monkeypatch.setattr("lsast_export.tensorrt.compile._build", build)
    compile_bundle(EMBEDDED, CompileOptions("tensorrt-rtx", compute_dtype=compute_dtype), tmp_path)
    assert halves == {name: compute_dtype == "fp16" and name != "vae_encoder" for name in REQUIRED_GRAPHS}


@needs_rtx
@pytest.mark.parametrize(
    ("compute_dtype", "targets"), [("fp16", TARGETS), pytest.param("fp32", TARGETS[:1], marks=pytest.mark.slow)]
)
def test_embedded_bundle_compiles_for_every_target(tmp_path, compute_dtype, targets):
    """At the sizes that are the default."""
    options = CompileOptions("tensorrt-rtx", targets, compute_dtype=compute_dtype)
    records = compile_bundle(EMBEDDED, options, tmp_path)
    specs = Bundle.open(EMBEDDED).manifest.graphs
    assert records.keys() == set(REQUIRED_GRAPHS) <= specs.keys()
    for name, record in records.items():
        assert verified_record(tmp_path / f"{name}.engine") == record
        assert (record.key.targets, record.key.compute_dtype) == (targets, compute_dtype)
        assert record.key.profile == ShapeRanges().profile(specs[name])
