"""Graphs for GPUs: a bundle's graph with one node for each attention (`attention`), which computes in fp16.

Graphs store 16-bit weights and compute in float32 (`external_weights`), and tensor cores would stay idle. So a graph is
rewritten to compute in fp16 where that is safe, by the rule of torch's autocast: products, convolutions and elementwise
operators in fp16; norms, softmax, sums and the path to the sine of the timestep (fp16 has an error of 0.25 at 999) in
float32. Inputs and outputs stay float32, and the weights are those of the bundle's graph.
"""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from lsast_engines.bundle.graph_spec import VAE_ENCODER
from lsast_engines.errors import ExportError

from .attention import expand_attention, fuse_attention

FULL = frozenset(
    (
        *("Cos", "CumSum", "Exp", "Log", "Pow", "Range", "ReduceL2", "ReduceMean", "ReduceSum", "Sin", "Softmax"),
        *("GroupNormalization", "InstanceNormalization", "LayerNormalization"),
    )
)
"""Operators that stay in float32 (the list of torch.amp, docs.pytorch.org/docs/stable/amp.html)."""

FLOAT_GRAPHS = (VAE_ENCODER,)
"""Graphs that are float32 on a GPU, too. In fp16 the encoder of Stable Diffusion 1.5 is off by more than 1e-3; every
block has its part in that (docs/gpu.md), and it runs once a picture."""

_FLOAT_INPUTS = {"Resize": (1, 2)}
"""Inputs that are float32 by definition of the operator (onnx.ai/onnx/operators)."""

_HALF = ir.DataType.FLOAT16
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def dtypes_in(path: Path) -> set[str]:
    """ONNX's names of the number types in a graph file: those of weights, and results of casts."""
    model = ir.load(path)
    found = {str(value.dtype.name) for value in model.graph.initializers.values() if value.dtype is not None}
    for node in model.graph.all_nodes():
        if (attribute := node.attributes.get("to")) is not None:
            found.add(ir.DataType(attribute.as_int()).name)
    return found


def write_gpu_graph(path: Path, target: Path, name: str, *, half: bool = True, fused: bool = True) -> None:
    """Write the graph of `path` for GPUs to `target`, which needs the weight files of `path` beside it.

    Args:
        half: compute in fp16, but for `FLOAT_GRAPHS`, else in float32. There is no bf16: up to opset 21 ONNX has no
            convolution in it (onnx.ai/onnx/operators/onnx__Conv.html).
        fused: write attention as ONNX Runtime's operator, else as operators of ONNX, for TensorRT.

    Raises:
        ExportError: a graph with sub-graphs, or whose types cannot be inferred.
    """
    model = ir.load(path)
    infer_types = ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)
    infer_types(model)
    fuse_attention(model)
    if not fused:
        expand_attention(model)
        infer_types(model)
    if half and name not in FLOAT_GRAPHS:
        _Rewriter(model).run()
    ir.save(model, target)


class _Rewriter:
    """Gives every node of a graph float32 or fp16, and casts values between the two."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        """Rewrite the graph in place."""
        dtypes = [output.dtype for output in self._graph.outputs]
        stays = self._timestep_path()
        for node in list(self._graph):
            if any(isinstance(attribute.value, ir.Graph) for attribute in node.attributes.values()):
                raise ExportError(f"found operator {node.op_type} with a graph of its own; its types cannot be changed")
            self._retype(node, node in stays or node.op_type in FULL)
        for index, (output, dtype) in enumerate(zip(self._graph.outputs, dtypes, strict=True)):
            assert dtype is not None, "an output has a type"
            if output.dtype != dtype:
                name, output.name = output.name, f"{output.name}/half"
                cast = self._as(output, dtype)
                cast.name = name
                self._graph.outputs[index] = cast

    def _retype(self, node: ir.Node, full: bool) -> None:
        wanted = ir.DataType.FLOAT if full else _HALF
        if node.op_type == "Cast":
            self._retype_cast(node, full)
            return
        if node.op_type == "Constant" and not full:
            return  # it is cast where it is used; libraries fold that
        exempt = _FLOAT_INPUTS.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (ir.DataType.FLOAT, _HALF):
                to = ir.DataType.FLOAT if index in exempt else wanted
                node.replace_input_with(index, self._as(value, to))
        floats = any(
            value is not None and value.dtype == wanted and index not in exempt
            for index, value in enumerate(node.inputs)
        )
        for output in node.outputs:
            if output.dtype is None:
                raise ExportError(f"found no type of {output.name}; export the bundle again")
            if output.dtype == ir.DataType.FLOAT and floats:
                output.type = ir.TensorType(wanted)  # not `dtype`: values may share one type object

    def _retype_cast(self, node: ir.Node, full: bool) -> None:
        """Let the cast of a weight to float32 give fp16 instead; drop it if the weight is in fp16."""
        (source,), (output,) = node.inputs, node.outputs
        assert source is not None, "a cast has an input"
        # A timestep or a length does not fit 11 bits; it is cast only where it is combined with fp16 values.
        if full or node.attributes["to"].as_int() != ir.DataType.FLOAT or source.dtype not in _FLOATS:
            return
        if source.dtype == _HALF and not output.is_graph_output():
            ir.convenience.replace_all_uses_with(output, source)
            self._graph.remove(node, safe=True)
            return
        node.attributes["to"] = ir.AttrInt64("to", _HALF)
        output.type = ir.TensorType(_HALF)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in `dtype`, with one cast for all its users."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._casts:
            node = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{value.name}/as_{dtype.name}")
            (cast,) = node.outputs
            cast.name, cast.dtype, cast.shape = f"{value.name}/as_{dtype.name}", dtype, value.shape
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(next(iter(self._graph)), node)
            else:
                self._graph.insert_after(producer, node)
            self._casts[value, dtype] = cast
        return self._casts[value, dtype]

    def _timestep_path(self) -> set[ir.Node]:
        """All nodes that a sine or cosine depends on."""
        found: set[ir.Node] = set()
        todo = [node for node in self._graph if node.op_type in ("Sin", "Cos")]
        while todo:
            node = todo.pop()
            found.add(node)
            producers = (value.producer() for value in node.inputs if value is not None)
            todo += [producer for producer in producers if producer is not None and producer not in found]
        return found
