"""The weights of graphs to quantize: read, folded, and stored once in a file that several graphs refer into.

For quantization a weight is in float32 and the direct input of the operator that uses it (`fold_weights`). An exported
graph casts 16-bit weights and transposes the matrix of every linear layer; backends fold that when they load, but a
quantizer would take such a matrix for an activation. And GEGLU computes value and gate by one product that is then
split: beside products in int8 the split costs much, so there are two products here.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Model = Any
"""An onnx.ModelProto."""
Node = Any
"""An onnx.NodeProto."""

Arrays = dict[str, Callable[[], npt.NDArray[Any]]]
"""Weights by name, computed when they are called."""

NAME = "weights.data"
"""Name of the weight file in a quantized bundle."""

_INLINE = 1024
"""Size in bytes below which a tensor stays in the graph: scales, axes, small biases."""
_PAGE = 4096
"""Alignment of tensors in the file, so that they can be memory-mapped."""

_HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


class Weights:
    """The initializers of a graph by name; those in a file of `folder` are read on each access."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._folder = folder

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self.tensors[name])  # older versions of onnx keep what they read in the tensor
        array: npt.NDArray[Any] = numpy_helper.to_array(tensor, str(self._folder))
        return array

    def as_float32(self, name: str) -> npt.NDArray[Any]:
        """An initializer, float32 where it holds floats."""
        array = self[name]
        is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        return array.astype(np.float32) if is_float else array


class WeightFile:
    """A file, open for writing, that the graphs of its folder refer into; each tensor is stored once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._path = file, Path(file.name)
        self._places: dict[str, tuple[int, int]] = {}

    def save(self, model: Model, source: Path, name: str) -> None:
        """Write `model` to the graph file `name`, and its weights to the weight file, one tensor in memory at a time.

        Its initializers, which refer to files in `source`, refer to the weight file afterwards.
        """
        weights = Weights(model, source)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(self.tensor(weights[tensor.name], tensor.name))
        onnx.save_model(model, str(self._path.with_name(name)))

    def tensor(self, array: npt.NDArray[Any], name: str) -> Any:
        """An initializer (onnx.TensorProto) that refers to `array` in the file; small arrays lie in it."""
        if array.nbytes < _INLINE:
            return numpy_helper.from_array(array, name)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._places:
            self._file.write(bytes(-self._file.tell() % _PAGE))
            self._places[digest] = (self._file.tell(), data.nbytes)
            self._file.write(data)
        offset, length = self._places[digest]
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        made = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
        made.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self._path.name), ("offset", str(offset)), ("length", str(length))):
            made.external_data.add(key=key, value=value)
        return made


def fold_weights(path: Path, store: WeightFile) -> Model:
    """The graph of `path` with float32 weights in `store`, transposes of weights folded, GEGLU gates split off.

    One weight is in memory at a time. It is named after the one that it was made from, so that a layer's weight has
    one name in all graphs of a bundle.
    """
    model = onnx.load(str(path), load_external_data=False)
    weights = Weights(model, path.parent)
    arrays: Arrays = {name: partial(weights.as_float32, name) for name in weights.tensors}
    renamed: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
        source = node.input[0] if node.input else ""
        if node.op_type == "Cast" and source in weights.tensors and weights.tensors[source].data_type in _HALVES:
            renamed[node.output[0]] = source
        elif node.op_type == "Transpose" and source in arrays:
            (order,) = [list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
            own = f"{source}/transposed{''.join(map(str, order))}"
            arrays[own] = _transposed(arrays[source], order)
            renamed[node.output[0]] = own
        else:
            kept.append(node)
    kept = _split_geglu(kept, arrays, [value.name for value in model.graph.output])
    used = {name for node in kept for name in node.input}
    replace_contents(model, kept, [store.tensor(array(), name) for name, array in arrays.items() if name in used])
    # The types and shapes in it are those of the weights before folding.
    del model.graph.value_info[:]
    return model


def replace_contents(model: Model, nodes: Iterable[Node], tensors: Iterable[Any]) -> None:
    """Replace the nodes and initializers of `model`."""
    nodes, tensors = list(nodes), list(tensors)
    del model.graph.node[:]
    del model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)


def biased_product(
    name: str, producers: Mapping[str, Node], constants: Collection[str], users: Mapping[str, int]
) -> tuple[Node, Node, str] | None:
    """The nodes of x W and of x W + b, and the name of b, if the value `name` is x W + b with constants W and b, and x
    W and x W + b have one reader each; None otherwise. `producers` has the node of each value, `users` the number
    of its readers."""
    add = producers.get(name)
    if add is None or add.op_type != "Add" or users[name] != 1:
        return None
    biases = [each for each in add.input if each in constants]
    products = [producers[each] for each in add.input if each in producers and producers[each].op_type == "MatMul"]
    if len(biases) != 1 or len(products) != 1:
        return None
    product = products[0]
    fits = product.input[1] in constants and users[product.output[0]] == 1
    return (product, add, biases[0]) if fits else None


def _transposed(array: Callable[[], npt.NDArray[Any]], order: list[int]) -> Callable[[], npt.NDArray[Any]]:
    return lambda: np.ascontiguousarray(array().transpose(order))


def _half(array: Callable[[], npt.NDArray[Any]], index: int) -> Callable[[], npt.NDArray[Any]]:
    return lambda: np.ascontiguousarray(np.split(array(), 2, axis=-1)[index])


def _split_geglu(nodes: list[Node], arrays: Arrays, outputs: list[str]) -> list[Node]:
    """Turn Split(x W + b) along the last axis into products with the halves of W, if nothing else reads x W + b."""
    producers = {output: node for node in nodes for output in node.output}
    users = Counter([*outputs, *(name for node in nodes for name in node.input)])
    replaced: dict[int, list[Node]] = {}
    for node in nodes:
        splits = node.op_type == "Split" and len(node.output) == 2
        found = biased_product(node.input[0], producers, arrays, users) if splits else None
        if found is None:
            continue
        product, add, bias = found
        shape = arrays[product.input[1]]().shape
        if shape[1] % 2 or arrays[bias]().shape != shape[1:]:
            continue
        halves = []
        for index, output in enumerate(node.output):
            weight, offset, between = (f"{name}/half{index}" for name in (product.input[1], bias, product.output[0]))
            arrays[weight], arrays[offset] = _half(arrays[product.input[1]], index), _half(arrays[bias], index)
            halves += [
                onnx.helper.make_node("MatMul", [product.input[0], weight], [between], f"{product.name}/half{index}"),
                onnx.helper.make_node("Add", [between, offset], [output], f"{add.name}/half{index}"),
            ]
        replaced |= {id(product): [], id(add): [], id(node): halves}
    return [after for node in nodes for after in replaced.get(id(node), [node])]
