"""The graph that takes a solver's step on a device: written here, kept beside the engines that run it.

    python -m lsast_export.advance

writes `engines/lsast_engines/advance.onnx` again. It holds no weights and is the same for every base.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lsast_engines.files import replace_file
from lsast_engines.loop import ADVANCE_GRAPH
from lsast_engines.spec import TensorSpec, advance_spec


def advance_model() -> onnx.ModelProto:
    """``advance`` as ONNX, see `lsast_engines.spec.advance_spec`: products and two sums, no rounding to TF32."""
    spec = advance_spec()
    axes = {"over_latents": [2, 3, 4], "over_cells": [3, 4, 5], "first": [0], "second": [1]}
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["halves", "over_latents"], ["halves_wide"]),
        node("Mul", ["eps", "halves_wide"], ["weighed_eps"]),
        node("ReduceSum", ["weighed_eps", "first"], ["noise"], keepdims=1),
        node("Concat", ["state", "noise"], ["known"], axis=0),
        node("Unsqueeze", ["known", "first"], ["known_row"]),
        node("Unsqueeze", ["moves", "over_cells"], ["moves_wide"]),
        node("Mul", ["known_row", "moves_wide"], ["terms"]),
        node("ReduceSum", ["terms", "second"], ["advanced"], keepdims=0),
    ]
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in axes.items()]
    sides = [[_border(tensor) for tensor in side] for side in (spec.inputs, spec.outputs)]
    graph = helper.make_graph(nodes, spec.name, *sides, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="lsast")
    onnx.checker.check_model(model, full_check=True)
    return model


def _border(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.shape))


if __name__ == "__main__":
    with replace_file(ADVANCE_GRAPH) as file:
        file.write(advance_model().SerializeToString(deterministic=True))
