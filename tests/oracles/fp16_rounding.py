"""What fp16 computes on a GPU, where every result of an operator is rounded: of a graph, and of torch as a yardstick.

On a CPU, ONNX Runtime computes most operators of such a graph in float32 and leaves the casts between them out, so that
its own result is nearer to that of the graph in float32 than a GPU's.
"""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

EXACT = ("Cast", "Concat", "Constant", "Expand", "Reshape", "Shape", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that copy values."""


def round_every_result(path: Path, target: Path) -> int:
    """Write the fp16 graph of `path` to `target` with its operators in float32, each between casts: → their number.

    An Identity keeps a cast to fp16 apart from the cast back, or ONNX Runtime would remove both.
    """
    model = ir.load(path)
    count = 0
    for node in list(model.graph):
        halves = [index for index, value in enumerate(node.inputs) if value is not None and _is_half(value)]
        if node.op_type in EXACT or not halves:
            continue
        count += 1
        for index in halves:
            cast = _node("Cast", node.inputs[index], f"{node.name}/input{index}", to=ir.DataType.FLOAT)
            model.graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        for output in filter(_is_half, node.outputs):
            uses = tuple(output.uses())
            output.type = ir.TensorType(ir.DataType.FLOAT)
            cast = _node("Cast", output, f"{output.name}/rounded", to=ir.DataType.FLOAT16)
            kept = _node("Identity", cast.outputs[0], f"{output.name}/kept")
            model.graph.insert_after(node, [cast, kept])
            for user, index in uses:
                user.replace_input_with(index, kept.outputs[0])
    ir.save(model, target)
    return count


class SumsInFloat(TorchDispatchMode):
    """Networks in ``torch.float16`` compute on a CPU as on a GPU: an operator's sums in float32, its result rounded."""

    _OPERATORS = (
        *(torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm),
        *(torch.ops.aten.native_group_norm, torch.ops.aten.native_layer_norm, torch.ops.aten._softmax),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    )

    def __torch_dispatch__(self, operator: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        values = (arguments, named or {})
        if operator.overloadpacket not in self._OPERATORS:
            return operator(*values[0], **values[1])
        values = tree_map(lambda x: x.float() if _is(x, torch.float16) else x, values)
        half = any(_is(value, torch.float16) for value in arguments)
        result = operator(*values[0], **values[1])
        return tree_map(lambda x: x.half() if half and _is(x, torch.float32) else x, result)


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == dtype


def _is_half(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT16


def _node(op_type: str, source: ir.Value | None, name: str, **attributes: ir.DataType) -> ir.Node:
    node = ir.node(op_type, [source], attributes=attributes, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(attributes.get("to", ir.DataType.FLOAT16))
    return node
