"""Rewrites attention for GPUs: one node for each attention of a network, with all of its heads.

torch writes an attention as MatMul, Softmax and MatMul between reshapes and transposes, and for CPUs the heads of a
large self-attention are split (`modules.SplitProcessor`). ONNX Runtime's CUDA provider has one kernel for all of it,
which never holds the scores in memory (FlashAttention, arXiv 2307.08691), for its own operator MultiHeadAttention.
What is computed stays the same.

ONNX's own Attention needs operator set 23. There the CUDA provider of ONNX Runtime 1.31 has no InstanceNormalization:
those nodes would run on the CPU, and a graph with such nodes cannot be captured.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN, OPERATOR = "com.microsoft", "MultiHeadAttention"
"""The operator (ContribOperators.md of ONNX Runtime): query, key and value are [B, N, heads·D]."""

_SWAP_HEADS = [0, 2, 1, 3]
"""Transpose between [B, N, heads, D] and [B, heads, N, D]."""


_Attention = tuple[tuple[ir.Value, ir.Value, ir.Value], float]
"""Q, K and V [B, heads, N, D], and the scale, of softmax(scale · Q Kᵀ) V."""


def fuse_attention(model: ir.Model) -> int:
    """Replace every attention of `model` by one node of `OPERATOR`, and count these.

    The shapes of values must be known (`ShapeInferencePass`).
    """
    count = 0
    for join in list(model.graph):
        swap = _producer(join.inputs[0], "Transpose", _SWAP_HEADS) if join.op_type == "Reshape" else None
        found = _attention_of(swap.inputs[0]) if swap is not None and _has_rank(join.outputs[0], 3) else None
        if found is None:
            continue
        values, scale = found
        inputs = [source for value in values if (source := _joined_heads(value)) is not None]
        if len(inputs) != len(values):
            continue
        attributes = {"num_heads": inputs[0][1], "scale": scale}
        node = ir.node(OPERATOR, [value for value, _ in inputs], attributes=attributes, domain=DOMAIN, name=join.name)
        _replace(join, [node])
        count += 1
    if count:
        model.opset_imports[DOMAIN] = 1
    RemoveUnusedNodesPass()(model)
    return count


def expand_attention(model: ir.Model) -> None:
    """Replace every node of `fuse_attention` by operators of ONNX, with all heads at once: TensorRT fuses these.

    The new values have no types yet.
    """
    for attention in list(model.graph):
        if attention.op_type == OPERATOR and attention.domain == DOMAIN:
            tape = ir.tape.Tape()
            heads = attention.attributes["num_heads"].as_int()
            split, joined, scale = (
                tape.op("Constant", [], {"value": ir.tensor(value)})
                for value in (
                    np.array([0, 0, heads, -1]),
                    np.array([0, 0, -1]),
                    np.array(attention.attributes["scale"].as_float(), np.float32),
                )
            )
            query, key, value = (
                tape.op("Transpose", [tape.op("Reshape", [source, split])], {"perm": perm})
                for source, perm in zip(attention.inputs[:3], (_SWAP_HEADS, [0, 2, 3, 1], _SWAP_HEADS), strict=True)
            )
            scores = tape.op("Softmax", [tape.op("MatMul", [tape.op("Mul", [query, scale]), key])], {"axis": -1})
            mixed = tape.op("Transpose", [tape.op("MatMul", [scores, value])], {"perm": _SWAP_HEADS})
            tape.op("Reshape", [mixed, joined])
            _replace(attention, tape.nodes)
    model.opset_imports.pop(DOMAIN, None)


def _attention_of(value: ir.Value | None) -> _Attention | None:
    """The attention that gives `value`: one of all heads, or several of some heads each, concatenated."""
    concat = _producer(value, "Concat")
    if concat is None:
        return _single_attention(value)
    parts = [_single_attention(part) for part in concat.inputs]
    found = [part for part in parts if part is not None]
    scales = {scale for _, scale in found}
    if concat.attributes["axis"].as_int() != 1 or len(found) != len(parts) or len(scales) != 1:
        return None
    query, key, value = (_split_source([inputs[index] for inputs, _ in found]) for index in range(3))
    return None if query is None or key is None or value is None else ((query, key, value), scales.pop())


def _single_attention(value: ir.Value | None) -> _Attention | None:
    product = _producer(value, "MatMul")
    softmax = _producer(product.inputs[0], "Softmax") if product is not None else None
    scores = _producer(softmax.inputs[0], "MatMul") if softmax is not None else None
    if product is None or scores is None:
        return None
    query, factor = _unscaled(scores.inputs[0])
    transposed, other = _unscaled(scores.inputs[1])
    key, values = _untransposed(transposed), product.inputs[1]
    if query is None or key is None or values is None:
        return None
    return (query, key, values), factor * other


def _split_source(values: Sequence[ir.Value]) -> ir.Value | None:
    """What was split along the heads into exactly `values`, in this order."""
    node = _producer(values[0], "Split")
    if node is None or node.attributes["axis"].as_int() != 1 or list(node.outputs) != list(values):
        return None
    return node.inputs[0]


def _joined_heads(value: ir.Value) -> tuple[ir.Value, int] | None:
    """[B, N, heads·D] and the number of heads, if `value` [B, heads, N, D] is made of it."""
    swap = _producer(value, "Transpose", _SWAP_HEADS)
    view = _producer(swap.inputs[0], "Reshape") if swap is not None else None
    source, shape = (None, None) if view is None else (view.inputs[0], view.outputs[0].shape)
    if source is None or shape is None or not _has_rank(source, 3) or not isinstance(shape[2], int):
        return None
    return source, shape[2]


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """`value` without a multiplication by a constant, and that constant."""
    node = _producer(value, "Mul")
    for operand, other in zip(node.inputs, reversed(node.inputs), strict=True) if node is not None else ():
        constant = ir.convenience.get_const_tensor(operand) if operand is not None else None
        if constant is not None and constant.size == 1:
            return other, float(constant.numpy().item())
    return value, 1.0


def _untransposed(value: ir.Value | None) -> ir.Value | None:
    """The tensor whose last two axes are exchanged in `value`: by a Transpose, or by one of three axes in reshapes."""
    if (node := _producer(value, "Transpose", [0, 1, 3, 2])) is not None:
        return node.inputs[0]
    outer = _producer(value, "Reshape")
    swap = _producer(outer.inputs[0], "Transpose", [0, 2, 1]) if outer is not None else None
    inner = _producer(swap.inputs[0], "Reshape") if swap is not None else None
    return inner.inputs[0] if inner is not None else None


def _producer(value: ir.Value | None, op_type: str, perm: list[int] | None = None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type or (perm and list(node.attributes["perm"].as_ints()) != perm):
        return None
    return node


def _has_rank(value: ir.Value, rank: int) -> bool:
    return value.shape is not None and len(value.shape) == rank


def _replace(node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` in the place of `node`; the one output of the last gives what `node` gave."""
    (old,), (output,) = node.outputs, new[-1].outputs
    output.name, output.type, output.shape = old.name, old.type, old.shape
    assert node.graph is not None, "nodes of a model are in its graph"
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, [old], [output])
