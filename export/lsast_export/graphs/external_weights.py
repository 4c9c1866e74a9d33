"""Weights stored once: ONNX initializers that are byte ranges of ``base.safetensors``.

A safetensors file is 8 bytes of header length, a JSON header, then raw tensors; ONNX external data is an offset and a
length in a file. So the graphs of a bundle refer into the file that training reads. With the storage dtype `fp16` or
`bf16` the file holds 16-bit numbers, and the graph casts each weight to float32, which runtimes fold when they load: a
CPU computes in float32 exactly what torch computes with the same rounded weights.
"""

from pathlib import Path

import onnx_ir as ir

from lsast_engines.bundle.safetensors_header import read_slots
from lsast_engines.errors import ExportError, fault_list

from .trace import TracedGraph

_TYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


def save_graph(graph: TracedGraph, weights: Path, path: Path) -> None:
    """Write `graph` to `path`, its weights referring into `weights`, a safetensors file in the same folder.

    Raises:
        ExportError: a weight that `weights` does not hold with the same shape; all of them at once.
    """
    slots = read_slots(weights)
    model = graph.model.clone()
    inputs = {str(value.name): value for value in model.graph.inputs}
    faults, casts = [], []
    for name in graph.weights:
        value, slot = inputs[name], slots.get(name)
        shape = tuple(value.shape.numpy()) if value.shape is not None else None
        if slot is None or slot.shape != shape or slot.dtype not in _TYPES:
            found = "nothing" if slot is None else f"{slot.dtype} {list(slot.shape)}"
            faults.append(f"{name}: found {found} in {weights.name}; expected F32, F16 or BF16 {list(shape or ())}")
            continue
        model.graph.inputs.remove(value)
        dtype = _TYPES[slot.dtype]
        if dtype != ir.DataType.FLOAT:
            casts.append(_cast(value))
        value.type = ir.TensorType(dtype)  # not `dtype`: a clone shares its type objects with the original
        value.const_value = ir.ExternalTensor(
            weights.name, slot.offset, slot.length, dtype, shape=ir.Shape(slot.shape), name=name, base_dir=path.parent
        )
        model.graph.register_initializer(value)
    if faults:
        raise ExportError(fault_list(f"the graph {graph.spec.name!r} needs weights that are not stored:", faults))
    if casts:
        first = next(iter(model.graph), None)
        assert first is not None, "a graph with weights has nodes"
        model.graph.insert_before(first, casts)
    ir.save(model, path)


def _cast(weight: ir.Value) -> ir.Node:
    """A node that casts `weight` to float32 and takes its place everywhere."""
    uses = tuple(weight.uses())
    node = ir.node("Cast", [weight], attributes={"to": ir.DataType.FLOAT}, name=f"{weight.name}/cast")
    (output,) = node.outputs
    output.name = f"{weight.name}/float32"
    for user, index in uses:
        user.replace_input_with(index, output)
    return node
