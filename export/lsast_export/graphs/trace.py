"""Traces torch modules into ONNX graphs whose weights are names only.

Two steps of `torch.onnx.export` are done here: torch.export captures the operators, and each becomes an ONNX function.
Two are left out. Decomposition and type promotion trace all again, and would find nothing to do: every operator of our
networks has an ONNX function, and they compute in float32. The optimizer would fold small weights into new constants:
these would be stored twice and, in fp16, unrounded. Instead the weights become inputs of the graph, the rest is
optimized, and `external_weights` turns them into references into ``base.safetensors``.

So no value of a weight is needed. While a module is traced, fake tensors, which have a shape and no memory, replace its
weights, and `module` may be on the meta device (`base_on_meta`).
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.onnx._internal.exporter._core import (
    _exported_program_to_onnx_program,
    _prepare_exported_program_for_export,
)
from torch.onnx._internal.exporter._fx_passes import remove_assertion_nodes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from lsast_engines.bundle.graph_spec import (
    CONTROLNET,
    DENOISER,
    REQUIRED_GRAPHS,
    UNET_FULL,
    UNET_OUTER,
    UNET_SPLIT_GRAPHS,
    GraphSpec,
    downsampling_level,
    graph_specs,
    split_specs,
)
from lsast_engines.errors import ExportError, fault_list
from lsast_train.base.base import Base

from ..progress import Progress, no_progress
from .modules import geometry, graph_module, unet_split

OPSET = 18
"""ONNX operator set. Newer ones have a native Attention, which TensorRT refuses for head widths under 16."""

INLINE_LIMIT = 1 << 16
"""Largest constant in bytes: a larger one that is not a weight must be a folded weight, and is refused."""

_EXAMPLE_ROWS = {"B": 2, "G": 3}
_EXAMPLE_SIDES = (2, 3)
"""Lengths of the dynamic axes while tracing; height and width in units of the smallest legal size. All differ, and none
is 1: torch takes equal lengths for the same axis and specialises on 1."""

_CLEAN_UP = Sequential(
    RemoveUnusedNodesPass(),
    RemoveUnusedOpsetsPass(),
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    DeduplicateInitializersPass(),
    CommonSubexpressionEliminationPass(),
    NameFixPass(),
)


@dataclass(frozen=True, eq=False)
class TracedGraph:
    """A graph without its weights."""

    spec: GraphSpec
    model: ir.Model
    """Its inputs are those of `spec`, then one for each weight."""
    weights: tuple[str, ...]
    """Names of the weights, as in ``base.safetensors``."""


def trace_graphs(
    base: Base, names: Sequence[str] = (*REQUIRED_GRAPHS, *UNET_SPLIT_GRAPHS), progress: Progress = no_progress
) -> dict[str, TracedGraph]:
    """Trace graphs of `base`, which may be on the meta device; the results have no weights and fit every storage dtype.

    Two are made of others: the denoiser is `controlnet` and `unet_full`, joined; `unet_outer` is cut out of the latter.

    Raises:
        ExportError: a graph that torch cannot export, or one with other inputs and outputs than specified.
    """
    widths = geometry(base)
    specs = graph_specs(widths) | split_specs(widths, unet_split(base))
    made = {DENOISER: (CONTROLNET, UNET_FULL), UNET_OUTER: (UNET_FULL,)}
    traced = {}
    for name in dict.fromkeys(source for wanted in names for source in made.get(wanted, (wanted,))):
        progress(f"tracing {name}")
        traced[name] = trace(graph_module(base, name), specs[name], base.config.multiple, widths.factor)
    if DENOISER in names:
        traced[DENOISER] = _joined(traced[CONTROLNET], traced[UNET_FULL], specs[DENOISER])
    if UNET_OUTER in names:
        traced[UNET_OUTER] = _outermost(traced[UNET_FULL], specs[UNET_OUTER])
    return {name: traced[name] for name in names}


def _joined(controlnet: TracedGraph, unet: TracedGraph, spec: GraphSpec) -> TracedGraph:
    """The denoiser: `unet` on the residuals of `controlnet`, without its second output."""
    model, source = controlnet.model.clone(), unet.model.clone().graph
    graph, eps = model.graph, source.outputs[0]
    found = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for value in source.inputs:
        if value.name in found:
            value.replace_all_uses_with(found[value.name])
    inputs = {str(value.name): value for value in (*source.inputs, *graph.inputs)}  # of both, the first graph's
    nodes, constants = list(source), list(source.initializers.values())
    for part in (source.inputs, source.outputs, source.initializers, graph.inputs, graph.outputs):
        part.clear()
    source.remove(nodes)
    for value in (*constants, *(value for node in nodes for value in node.outputs if value is not eps)):
        value.name = f"unet_{value.name}"  # both networks count their values from 0
    for node in nodes:
        node.name = f"unet_{node.name}"
    graph.initializers.update({str(value.name): value for value in constants})
    graph.extend(nodes)
    weights = tuple(sorted((*controlnet.weights, *unet.weights)))
    graph.inputs.extend(inputs[name] for name in (*(tensor.name for tensor in spec.inputs), *weights))
    graph.outputs.append(eps)
    _CLEAN_UP(model)
    return TracedGraph(spec, model, weights)


def _outermost(unet: TracedGraph, spec: GraphSpec) -> TracedGraph:
    """The outermost level of `unet`, which takes what is the second output of `unet`."""
    model = unet.model.clone()
    graph = model.graph
    whole = graph.outputs.pop()
    feature = ir.val(whole.name, shape=whole.shape, type=whole.type)
    whole.replace_all_uses_with(feature)
    RemoveUnusedNodesPass()(model)  # all levels below
    inputs = {str(value.name): value for value in (*graph.inputs, feature)}
    weights = tuple(name for name in unet.weights if inputs[name].uses())
    wanted = (*(tensor.name for tensor in spec.inputs), *weights)
    if deep := [name for name, value in inputs.items() if value.uses() and name not in wanted]:
        raise ExportError(f"the graph {spec.name!r} cannot be cut out of {unet.spec.name!r}: it uses {', '.join(deep)}")
    graph.inputs[:] = [inputs[name] for name in wanted]
    return TracedGraph(spec, model, weights)


def trace(module: nn.Module, spec: GraphSpec, multiple: int, factor: int) -> TracedGraph:
    """Export `module`, whose arguments are the inputs of `spec`, with every named axis dynamic.

    Args:
        multiple: legal picture sizes are multiples of this many pixels.
        factor: pixels along a side of one latent cell.

    Raises:
        ExportError: torch cannot export it, or the graph's inputs and outputs differ from `spec`.
    """
    try:
        with _quiet(), torch.no_grad(), _without_weights(module):
            examples, dynamic = _examples(spec, multiple, factor), torch.export.ShapesCollection()
            for example, tensor in zip(examples, spec.inputs, strict=True):
                # AUTO: the axis is dynamic, and torch infers which axes must be equal or even.
                named = [axis for axis, length in enumerate(tensor.shape) if isinstance(length, str)]
                dynamic[example] = dict.fromkeys(named, torch.export.Dim.AUTO)
            shapes = dynamic.dynamic_shapes(module, examples)
            program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
            remove_assertion_nodes(program.graph_module)
            functions = _onnx_functions()
            called = [node.target for node in program.graph.nodes if node.op == "call_function"]
            if not all(map(functions.is_registered, called)):  # a network with an operator that ours have not
                program = _prepare_exported_program_for_export(program, registry=functions)
            model = _exported_program_to_onnx_program(program, registry=functions).model
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise ExportError(f"torch cannot export the graph {spec.name!r}: {error}") from error
    _name_interface(model, spec)
    weights = _detach_weights(model, {name for name, _ in (*module.named_parameters(), *module.named_buffers())})
    _optimize(model)
    _check_constants(model, spec)
    axes = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in axes:
            value.shape = ir.Shape(axes[value.name])
    return TracedGraph(spec, model, weights)


@functools.cache
def _onnx_functions() -> ONNXRegistry:
    """The ONNX functions of torch's operators, with two that our networks need and torch has not."""
    from onnxscript import opset18

    def to_dtype(values: Any, dtype: int, *_: Any) -> Any:
        return opset18.Cast(values, to=dtype)

    def rsub(values: Any, other: float, alpha: float = 1.0) -> Any:
        return opset18.Sub(float(other), opset18.Mul(values, float(alpha)))

    registry = ONNXRegistry.from_torchlib()
    registry.register_op(torch.ops.aten.to.dtype, to_dtype)
    registry.register_op(torch.ops.aten.rsub.Scalar, rsub)
    return registry


def _examples(spec: GraphSpec, multiple: int, factor: int) -> tuple[torch.Tensor, ...]:
    """Random inputs of distinct lengths along every dynamic axis."""
    (height, width), cell = _EXAMPLE_SIDES, multiple // factor
    lengths = {"h": height * cell, "w": width * cell, "H": height * multiple, "W": width * multiple, **_EXAMPLE_ROWS}
    examples = []
    for tensor in spec.inputs:
        shape = [
            axis if isinstance(axis, int) else lengths.get(axis) or lengths[axis[0]] >> downsampling_level(axis)
            for axis in tensor.shape
        ]
        examples.append(torch.rand(shape) if tensor.dtype == "float32" else torch.arange(1, shape[0] + 1))
    return tuple(examples)


@contextlib.contextmanager
def _without_weights(module: nn.Module) -> Iterator[None]:
    """Replace weights and buffers of `module`, and all tensors that are made in the block, by fake tensors."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes: dict[str, torch.Tensor] = {
            name: nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=False)
            for name, tensor in tensors.items()
        }
        with _reparametrize_module(module, fakes):
            yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's notes (missing torchvision, deprecations inside torch)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_interface(model: ir.Model, spec: GraphSpec) -> None:
    """Name the graph's inputs and outputs as in `spec`, and compare their types, fixed and dynamic axes."""
    faults = []
    for side, values, tensors in (
        ("input", model.graph.inputs, spec.inputs),
        ("output", model.graph.outputs, spec.outputs),
    ):
        faults += [f"{side} {value.name}: not expected" for value in values[len(tensors) :]]
        faults += [f"{side} {tensor.name}: missing" for tensor in tensors[len(values) :]]
        for value, tensor in zip(values, tensors, strict=False):
            value.name = tensor.name
            shape = list(value.shape or ())
            dtype = value.dtype.numpy().name if value.dtype is not None else "nothing"
            fits = len(shape) == len(tensor.shape) and all(
                not isinstance(axis, int) if isinstance(length, str) else axis == length
                for axis, length in zip(shape, tensor.shape, strict=True)
            )
            if not fits or dtype != tensor.dtype:
                faults.append(f"{side} {tensor.name}: found {dtype} {[str(axis) for axis in shape]}; expected {tensor}")
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        # A value that stands for two of them keeps the last name.
        named = zip(values, tensors, strict=False)
        faults += [f"{tensor.name}: is {value.name}, too" for value, tensor in named if value.name != tensor.name]
    if faults:
        raise ExportError(fault_list(f"the exported graph {spec.name!r} has another interface:", faults))


def _detach_weights(model: ir.Model, names: set[str]) -> tuple[str, ...]:
    """Turn every initializer in `names` that the graph uses into a further input; returns their names."""
    graph = model.graph
    weights = {name: graph.initializers.pop(name) for name in sorted(names & graph.initializers.keys())}
    used = tuple(name for name, value in weights.items() if value.uses())
    for name in used:
        weights[name].const_value = None
        graph.inputs.append(weights[name])
    return used


def _optimize(model: ir.Model) -> None:
    """Fold constants; drop what computes nothing, unused values, and metadata about the Python source of nodes.

    This is `onnxscript.optimizer.optimize` with those of its rules that find something in our graphs. Of the others,
    `slice_split_rule` compares every slice with every node: for Stable Diffusion's U-Net it took most of the time.
    """
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    rewrite = rewriter.RewritePass(
        (
            rules.collapse_slice_rule,
            rules.collapse_slice2_rule,
            rules.div_by_1_rule,
            rules.fuse_pad_into_conv_rule,
            rules.materialize_reshape_shape_rule,
            rules.mul_by_1_rule,
            rules.no_op_transpose_rule,
            rules.reshape_reshape_rule,
            rules.squeeze_reshape_1d_rule,
            rules.transpose_transpose_rule,
            rules.unsqueeze_unsqueeze_rule,
        )
    )
    with _quiet():
        for _ in range(2):  # what a rule leaves may be folded
            optimizer.fold_constants(model, onnx_shape_inference=True)
            rewrite(model)
            RemoveUnusedNodesPass()(model)
    _CLEAN_UP(model)
    ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    model.metadata_props.clear()
    results = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *results):
        value.metadata_props.clear()
        value.doc_string = None
    for value in results:
        if not value.is_graph_output():
            # It uses torch's own symbols, which would contradict the axis names given below.
            value.shape = value.type = None


def _check_constants(model: ir.Model, spec: GraphSpec) -> None:
    constants = {name: value.const_value for name, value in model.graph.initializers.items()}
    faults = [
        f"{name}: found a constant of {held.nbytes} bytes that is no weight; at most {INLINE_LIMIT} are fine"
        for name, held in constants.items()
        if held is not None and held.nbytes > INLINE_LIMIT
    ]
    if faults:
        raise ExportError(fault_list(f"the graph {spec.name!r} would store weights twice:", faults))
