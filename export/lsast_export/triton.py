"""A model repository for Triton Inference Server: a bundle's graphs, served to many clients at once.

::

    DIR/mini_denoiser/config.pbtxt                       inputs, outputs, and which backend serves them
    DIR/mini_denoiser/1/model.onnx/model.onnx            the graph, with --backend onnxruntime
    DIR/mini_denoiser/1/model.onnx/denoiser.data         its weights
    DIR/mini_denoiser/1/model.plan                       the engine, with --backend tensorrt
    DIR/mini_encoder/…

Clients run the loop of `lsast.sampler` and send keys and values with every step, as any engine takes them: the server
knows no style. Triton takes no scalars (ValidateIOShape of its core): those of a graph are inputs of shape [1] there.
Its own batching is off, since guidance and pictures are two axes of one request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from lsast_engines.errors import ExportError, UsageError, fault_list
from lsast_engines.files import replace_file
from lsast_engines.manifest import Manifest
from lsast_engines.spec import EVERY, GraphSpec, TensorSpec

from .progress import Progress, silent
from .tensorrt import CompileOptions, compile_graph, require_float

VERSION = "1"
"""Folder of the one version of each model; Triton serves the highest."""

PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
"""What Triton calls the form of a model, by backend. It has no backend for the engines of TensorRT-RTX."""

ALIGNMENT = 64
"""Of the first byte of every weight in its file."""

_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


def write_repository(
    bundle: Path, folder: Path, engines: CompileOptions | None = None, progress: Progress = silent
) -> dict[str, Path]:
    """Write a model for each graph of a bundle into a model repository, which may hold others.

    Args:
        bundle: the bundle's folder.
        folder: the repository; made if it is not there.
        engines: compile the graphs with TensorRT, so; None serves the graphs with ONNX Runtime.
        progress: told of each model.

    Returns:
        The models' folders by graph, each whole: of a call that fails none is left.

    Raises:
        UsageError: models of these names are there already, all named; or engines of TensorRT-RTX.
        ExportError, BackendError, MissingExtraError: see `tensorrt.compile_graph`.
    """
    if engines is not None and engines.library != "tensorrt":
        raise UsageError(f"found engines of {engines.library}; Triton serves those of tensorrt, or onnxruntime")
    manifest = Manifest.from_json((bundle / "manifest.json").read_text(encoding="utf-8"), str(bundle / "manifest.json"))
    if engines is not None:
        require_float(manifest, bundle)
    models = {name: folder / f"{manifest.name}_{name}" for name in EVERY}
    if there := [str(model) for model in models.values() if model.exists()]:
        raise UsageError(fault_list("found models there already; remove them, or name another folder:", there))
    backend = "onnxruntime" if engines is None else engines.library
    folder.mkdir(parents=True, exist_ok=True)
    with _scratch(folder) as scratch:
        for name in EVERY:
            spec = manifest.graphs[name]
            served = served_spec(spec)
            model = scratch / models[name].name
            version = model / VERSION
            if engines is None:
                progress(f"writing {model.name}")
                _write_graph(bundle / f"{name}.onnx", spec, version / "model.onnx" / "model.onnx")
            else:
                version.mkdir(parents=True)
                source = scratch / "graphs" / f"{name}.onnx"
                _write_graph(bundle / f"{name}.onnx", spec, source)
                compile_graph(source, served, version / "model.plan", engines, progress)
            text = config_text(model.name, served, backend, {"base_fingerprint": manifest.fingerprint})
            (model / "config.pbtxt").write_text(text, encoding="utf-8")
        for model in models.values():
            (scratch / model.name).rename(model)
    return models


def served_spec(spec: GraphSpec) -> GraphSpec:
    """What clients send and get: the graph's inputs and outputs, a scalar as [1]."""
    inputs = tuple(dataclasses.replace(tensor, shape=tensor.shape or (1,)) for tensor in spec.inputs)
    return dataclasses.replace(spec, inputs=inputs)


def config_text(name: str, spec: GraphSpec, backend: str, parameters: dict[str, str]) -> str:
    """The text of ``config.pbtxt``, a `ModelConfig` in protobuf's text format.

    Args:
        name: the model's, as its folder.
        spec: from `served_spec`.
        backend: a key of `PLATFORMS`.
        parameters: facts for clients; Triton hands them out with the model's configuration.
    """
    lines = [
        f"name: {_quoted(name)}",
        f"backend: {_quoted(backend)}",
        f"platform: {_quoted(PLATFORMS[backend])}",
        "max_batch_size: 0",
        *(line for tensor in spec.inputs for line in _tensor_lines("input", tensor)),
        *(line for tensor in spec.outputs for line in _tensor_lines("output", tensor)),
    ]
    for key, value in parameters.items():
        lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
    return "\n".join(lines) + "\n"


def _tensor_lines(side: str, tensor: TensorSpec) -> list[str]:
    dims = ", ".join(str(axis if isinstance(axis, int) else -1) for axis in tensor.shape)
    axes = ", ".join(map(str, tensor.shape))
    return [
        f"{side} {{  # [{axes}]",
        f"  name: {_quoted(tensor.name)}",
        f"  data_type: {_TYPES[tensor.dtype]}",
        f"  dims: [ {dims} ]",
        "}",
    ]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _write_graph(path: Path, spec: GraphSpec, target: Path) -> None:
    """Write the graph file `path` to `target` with scalars as inputs of [1], its own weights beside it."""
    model = onnx.load(path, load_external_data=False)
    for tensor in spec.inputs:
        if not tensor.shape:
            one_element(model, tensor.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(target.parent / f"{spec.name}.data") as weights:
        _move_weights(model, path.parent, weights, f"{spec.name}.data")
    target.write_bytes(model.SerializeToString())


def _move_weights(model: onnx.ModelProto, folder: Path, weights: BinaryIO, name: str) -> None:
    """Copy what `model` refers to in files of `folder` into the open file `weights`, and refer there, by `name`.

    The files of a bundle hold the weights of all graphs. Links to them would do for ONNX Runtime, but onnx refuses
    those, hard ones too.
    """
    moved: dict[tuple[str, int, int], int] = {}
    with contextlib.ExitStack() as stack:
        sources: dict[str, BinaryIO] = {}
        for tensor in model.graph.initializer:
            if not uses_external_data(tensor):
                continue
            info = ExternalDataInfo(tensor)
            if info.location not in sources:
                sources[info.location] = stack.enter_context((folder / info.location).open("rb"))
            source, place = sources[info.location], (info.location, info.offset or 0, info.length)
            if place not in moved:
                weights.write(bytes(-weights.tell() % ALIGNMENT))
                moved[place] = weights.tell()
                source.seek(place[1])
                weights.write(source.read(info.length))
            entries = {"location": name, "offset": str(moved[place]), "length": str(info.length)}
            del tensor.external_data[:]
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)


def one_element(model: onnx.ModelProto, name: str) -> None:
    """Turn the scalar input `name` of a graph into one of shape [1]."""
    graph = model.graph
    scalar = f"{name}/scalar"
    for node in graph.node:
        if node.op_type in ("If", "Loop", "Scan"):
            raise ExportError(f"found operator {node.op_type} with a graph of its own; its inputs cannot be renamed")
        for index, value in enumerate(node.input):
            if value == name:
                node.input[index] = scalar
    border = next(value for value in graph.input if value.name == name)
    border.CopyFrom(helper.make_tensor_value_info(name, border.type.tensor_type.elem_type, [1]))
    nodes = [helper.make_node("Squeeze", [name], [scalar], scalar), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".lsast-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
