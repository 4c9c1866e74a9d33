"""The weights of a quantized bundle: one file that its graphs refer into, in which each tensor is stored once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from .fold_weights import Model, Weights

NAME = "weights.data"
"""Name of the file in a bundle."""

_INLINE = 1024
"""Size in bytes below which a tensor stays in the graph: scales, axes, small biases."""
_PAGE = 4096
"""Alignment of tensors, so that they can be memory-mapped."""


class WeightFile:
    """Writes the weight file of a folder, and graphs beside it. A context manager."""

    def __init__(self, folder: Path, name: str = NAME) -> None:
        self._folder, self._name = folder, name
        self._places: dict[str, tuple[int, int]] = {}
        self._file: BinaryIO = (folder / name).open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def save(self, model: Model, source: Path, name: str) -> None:
        """Write `model` to the graph file `name`, and its weights to the weight file, one tensor in memory at a time.

        Args:
            model: is changed; its initializers refer to the weight file afterwards.
            source: folder of the files that its initializers refer to.
            name: plain file name.
        """
        weights = Weights(model, source)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(self.tensor(weights[tensor.name], tensor.name))
        onnx.save_model(model, str(self._folder / name))

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
        for key, value in (("location", self._name), ("offset", str(offset)), ("length", str(length))):
            entry = made.external_data.add()
            entry.key, entry.value = key, value
        return made
