"""The weights of a bundle that is no longer a base: one file that its graphs refer into, each tensor there once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from .plain_graph import Model, Weights

NAME = "weights.data"
"""Of the file in the bundle."""

_INLINE = 1024
"""Bytes below which a tensor stays in the graph: scales, axes, biases of a few channels."""
_PAGE = 4096
"""Tensors begin at multiples of this, so that they can be mapped."""


class WeightFile:
    """Writes `NAME` into a folder, and graphs beside it. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, tuple[int, int]] = {}
        self._file: BinaryIO = (folder / NAME).open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def save(self, model: Model, source: Path, name: str) -> None:
        """Write `model` to the graph file `name`, its weights to the file of all; a tensor is in memory at a time.

        Args:
            model: its initializers lie in it, or in files of the folder `source`; it is changed.
            source: see there.
            name: plain file name.
        """
        weights = Weights(model, source)
        for tensor in model.graph.initializer:
            array = weights[tensor.name]
            if array.nbytes < _INLINE:
                inline = numpy_helper.from_array(array, tensor.name)
                inline.data_type = tensor.data_type
                tensor.CopyFrom(inline)
            else:
                self._refer(tensor, array)
        onnx.save_model(model, str(self._folder / name))

    def _refer(self, tensor: Any, array: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(array).tobytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._places:
            self._file.write(bytes(-self._file.tell() % _PAGE))
            self._places[digest] = (self._file.tell(), len(data))
            self._file.write(data)
        offset, length = self._places[digest]
        # What raw and typed fields held goes; name, type and shape stay.
        kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        kept.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", NAME), ("offset", str(offset)), ("length", str(length))):
            entry = kept.external_data.add()
            entry.key, entry.value = key, value
        tensor.CopyFrom(kept)
