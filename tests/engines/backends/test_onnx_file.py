"""Damaged and hostile graphs are refused before a backend parses them; onnx is the oracle of what an operator takes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lsast_engines.backends.onnx_file import OPERATORS, OPSET, check_graph
from lsast_engines.bundle.bundle import EMBEDDED
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS, UNET_SPLIT_GRAPHS
from lsast_engines.bundle.json_fields import parse_json
from lsast_engines.errors import BackendError

_NESTED = {"GRAPH", "GRAPHS", "TYPE_PROTO", "SPARSE_TENSOR"}


def test_operators_are_those_of_onnx():
    expected = {}
    for name in {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}:
        try:
            schema = onnx.defs.get_schema(name, OPSET, "")
        except onnx.defs.SchemaError:
            continue
        kinds = {attribute.type.name for attribute in schema.attributes.values()}
        if schema.deprecated or (kinds & _NESTED and name != "Constant"):
            continue
        most = [-1 if count == 2**31 - 1 else count for count in (schema.max_input, schema.max_output)]
        expected[name] = [
            *(schema.min_input, most[0], schema.min_output, most[1]),
            {key: [int(value.type.value), value.required] for key, value in schema.attributes.items()},
        ]
    assert parse_json(OPERATORS.read_bytes()) == expected


@pytest.mark.parametrize("name", [*REQUIRED_GRAPHS, *UNET_SPLIT_GRAPHS])
def test_check_graph_accepts_the_embedded_graphs(name):
    check_graph(EMBEDDED / f"{name}.onnx")


def _model() -> onnx.ModelProto:
    """y = Conv(Cast(x), w), with a constant that is not used."""
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, "H", 8]) for name in "xy"]
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["half", "w"], ["y"], pads=[0, 0, 0, 0]),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(3, np.float32))),
    ]
    weight = numpy_helper.from_array(np.zeros((3, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])


def _external(model: onnx.ModelProto, **place: str) -> None:
    (weight,) = model.graph.initializer
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        weight.external_data.add(key=key, value=value)


Change = Callable[[onnx.ModelProto], object]
HOSTILE: dict[str, Change] = {
    "Pad.*found inputs": lambda model: setattr(model.graph.node[0], "op_type", "Pad"),
    "operator Nothing of ai.onnx": lambda model: setattr(model.graph.node[0], "op_type", "Nothing"),
    "operator Cast of com.evil": lambda model: setattr(model.graph.node[0], "domain", "com.evil"),
    "operator If": lambda model: setattr(model.graph.node[0], "op_type", "If"),
    "attribute to is missing": lambda model: model.graph.node[0].ClearField("attribute"),
    "attribute to is unknown or given twice": lambda model: model.graph.node[0].attribute.append(
        model.graph.node[0].attribute[0]
    ),
    "another type than 2": lambda model: setattr(model.graph.node[0].attribute[0], "s", b"1"),
    "no earlier node computes nowhere": lambda model: model.graph.node[1].input.__setitem__(0, "nowhere"),
    "no earlier node computes half": lambda model: model.graph.node.insert(0, model.graph.node.pop(1)),
    "half: defined twice": lambda model: model.graph.node.append(model.graph.node[0]),
    "Conv y: found inputs": lambda model: model.graph.node[1].input.pop(),
    "output y: no node": lambda model: model.graph.node.pop(1),
    "weight w: found type 99": lambda model: setattr(model.graph.initializer[0], "data_type", 99),
    r"shape \[-1, 3": lambda model: model.graph.initializer[0].dims.__setitem__(0, -1),
    "expected 36000000 bytes": lambda model: model.graph.initializer[0].dims.__setitem__(0, 3_000_000),
    "fewer elements": lambda model: model.graph.initializer[0].dims.__setitem__(0, 2**62),
    "attribute value: expected 16 bytes": lambda model: model.graph.node[2].attribute[0].t.dims.__setitem__(0, 4),
    r"data in '\.\./secret'": lambda model: _external(model, location="../secret"),
    "data in 'missing'": lambda model: _external(model, location="missing"),
    "36 bytes at 99 of weights": lambda model: _external(model, location="weights", offset="99"),
    "8 bytes at 0 of weights": lambda model: _external(model, location="weights", length="8"),
    "invalid literal": lambda model: _external(model, location="weights", offset="0x"),
    r"version \[17\]": lambda model: setattr(model.opset_import[0], "version", 17),
    "functions or training": lambda model: model.functions.add(),
    "sparse weights": lambda model: model.graph.sparse_initializer.add(),
    "x: expected a tensor of numbers": lambda model: setattr(
        model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -5
    ),
    "y: expected a tensor": lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type", 8),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_check_graph_refuses_what_a_parser_relies_on(tmp_path, fault):
    (tmp_path / "weights").write_bytes(bytes(100))
    model = _model()
    check_graph(_written(tmp_path, model.SerializeToString()))
    _external(model, location="weights", offset="64", length="36")
    check_graph(_written(tmp_path, model.SerializeToString()))
    model = _model()
    HOSTILE[fault](model)
    with pytest.raises(BackendError, match=fault):
        check_graph(_written(tmp_path, model.SerializeToString()))


def _written(folder: Path, data: bytes) -> Path:
    (folder / "g.onnx").write_bytes(data)
    return folder / "g.onnx"


def test_check_graph_refuses_every_cut_and_reads_any_byte(tmp_path):
    data = _model().SerializeToString()
    for end in range(len(data)):
        with pytest.raises(BackendError):
            check_graph(_written(tmp_path, data[:end]))
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(len(data), size=3)] = rng.integers(256, size=3)
        try:
            check_graph(_written(tmp_path, damaged.tobytes()))
        except BackendError:
            continue
