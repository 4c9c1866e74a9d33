"""Graphs rewritten to compute in fp16 are sound, compute nearly the same, and do what is delicate in float32."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import pytest

from lsast_engines.bundle.bundle import Bundle
from lsast_export.graphs.gpu_graph import FULL, dtypes_in, write_gpu_graph

GRAPHS = ("vae_encoder", "controlnet_cond", "denoiser", "vae_decoder")


@pytest.fixture
def halved(bundles: dict[str, Bundle], tmp_path: Path) -> Callable[..., Path]:
    def write(storage_dtype: str, graph: str, fused: bool = True) -> Path:
        folder = bundles[storage_dtype].path
        shutil.copyfile(folder / "base.safetensors", tmp_path / "base.safetensors")
        write_gpu_graph(folder / f"{graph}.onnx", tmp_path / f"{graph}.onnx", graph, fused=fused)
        return tmp_path / f"{graph}.onnx"

    return write


def assert_one_float_type_a_node(nodes: Iterable[onnx.NodeProto], kinds: dict[str, int]) -> None:
    """ONNX's inference follows the first input of a product alone; TensorRT refuses two types."""
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    for node in nodes:
        inputs = [name for name in node.input if name][: 1 if node.op_type == "Resize" else None]
        assert len(floats & {kinds[name] for name in inputs if name in kinds}) <= 1, (node.op_type, node.name)


@pytest.mark.parametrize("storage_dtype", ["fp32", "fp16", "bf16"])
# Of these graphs, the denoiser alone has attention.
@pytest.mark.parametrize(("graph", "fused"), [*((graph, True) for graph in GRAPHS), ("denoiser", False)])
def test_write_gpu_graph_has_products_in_fp16_and_norms_and_the_encoder_in_fp32(halved, storage_dtype, graph, fused):
    path = halved(storage_dtype, graph, fused)
    onnx.checker.check_model(str(path), full_check=True)
    # onnx's own inference says what each value is, not what the rewriter noted.
    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.input)}
    kinds |= {weight.name: weight.data_type for weight in model.graph.initializer}
    assert_one_float_type_a_node(model.graph.node, kinds)
    found: dict[str, Counter[int]] = {}
    for node in model.graph.node:
        for output in node.output:
            if output in kinds:
                found.setdefault(node.op_type, Counter())[kinds[output]] += 1
    computed = onnx.TensorProto.FLOAT if graph == "vae_encoder" else onnx.TensorProto.FLOAT16
    assert set(found["Conv"]) == {computed}
    if graph == "denoiser":
        # The timestep's own embedding is of halves, its sine is not.
        assert set(found["MatMul"]) | set(found.get("Gemm", ())) == {onnx.TensorProto.FLOAT16}
        assert found["Sin"].keys() == found["Cos"].keys() == {onnx.TensorProto.FLOAT}
    for operator in FULL & found.keys():
        assert onnx.TensorProto.FLOAT16 not in found[operator], operator
    borders = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in borders} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_write_gpu_graph_casts_no_fp16_weight(halved):
    nodes = onnx.load(halved("fp16", "controlnet_cond"), load_external_data=False).graph.node
    assert Counter(node.op_type for node in nodes)["Cast"] == 2  # into the graph and out of it


def test_dtypes_in_are_those_of_weights_and_casts(bundles):
    assert {"FLOAT16", "FLOAT"} <= dtypes_in(bundles["fp16"].graph_path("controlnet_cond"))
    assert "BFLOAT16" in dtypes_in(bundles["bf16"].graph_path("controlnet_cond"))
    assert "FLOAT16" not in dtypes_in(bundles["fp32"].graph_path("controlnet_cond"))
