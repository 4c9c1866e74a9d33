"""Large 16-bit weights, converted once to a float32 file that backends can map.

A bundle in fp16 or bf16 is computed in float32. OpenVINO, and ONNX Runtime with fp16, expand such weights in memory and
then make packed copies, so that they need more memory than for a bundle in fp32. Therefore the weights are converted, a
tensor at a time, into a float32 file in the cache folder, and the graph is rewritten for that file: without casts, with
other offsets.

An ONNX file is a protocol buffer (onnx/onnx.proto; protobuf.dev/programming-guides/encoding). The runtime does not
depend on the onnx package; the few fields that change are rewritten here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.manifest import declared_hashes
from ..bundle.safetensors_header import Slot, encode_header, read_slots
from ..errors import BackendError, shown
from ..files import (
    FOR_OTHERS_TO_READ,
    MAKE_OWN,
    cache_home,
    file_sha256,
    make_folder,
    replace_file,
    written_by_others,
)
from .graph_cache import SOURCE, read_source
from .protobuf import LENGTH_DELIMITED, fields

MIN_BYTES = 1 << 30
"""Minimum size of a weight file to convert; smaller ones are left to the backend."""

WEIGHTS = "base.safetensors"
"""The weight file of a bundle."""

DIGEST_SUFFIX = ".sha256"
"""Suffix of the file beside converted weights that holds their SHA-256."""

_checked: set[tuple[Path, int, int, int]] = set()
"""Converted weights that were found whole: path, inode, size and time of change."""

_FLOAT = 1
_HALVES = {"F16": 10, "BF16": 16}
"""Number of the type in ONNX (TensorProto.DataType), by safetensors' name."""

_log = logging.getLogger("lsast.fp32_weights")


def with_fp32_weights(path: Path, cache: Path | None = None, dtypes: tuple[str, ...] = ("F16", "BF16")) -> Path:
    """The graph file to open for `path`: itself, or its rewritten copy beside converted weights.

    Without a cache folder of its own, with room, the backend expands the weights in memory, with a warning.

    Args:
        path: an ONNX file of a bundle.
        cache: folder for converted weights; None is ``fp32`` in the user's cache folder.
        dtypes: types to convert, by safetensors' name.
    """
    weights = path.parent / WEIGHTS
    if not weights.is_file() or weights.stat().st_size < MIN_BYTES:
        return path
    slots = read_slots(weights)
    if not any(slot.dtype in dtypes for slot in slots.values()):
        return path
    folder = (cache or cache_home() / "fp32") / _key(weights)
    if fault := _folder_fault(folder, cache, sum(slot.length * 2 for slot in slots.values())):
        _log.warning("painting needs more memory: %s", shown(fault))
        return path
    target, graph = folder / WEIGHTS, folder / path.name
    if not _is_whole(target):
        _convert(weights, slots, target)
    moved = {old.offset: new for old, new in zip(slots.values(), read_slots(target).values(), strict=True)}
    model = _rewritten_model(path.read_bytes(), moved)
    if not graph.is_file() or graph.read_bytes() != model:  # it may be there, and the folder for reading only
        with replace_file(graph, own=True) as handle:
            handle.write(model)
    return graph


def _folder_fault(folder: Path, cache: Path | None, size: int) -> str:
    """Why a folder cannot hold converted weights of about `size` bytes; empty if it can, or has them."""
    if others := written_by_others(folder, cache or cache_home()):
        return f"{others} may be written by others: {MAKE_OWN}"
    try:
        make_folder(folder, FOR_OTHERS_TO_READ)
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror}): set LSAST_HOME to a folder of your own"
    if (free := shutil.disk_usage(folder).free) < size and not (folder / WEIGHTS).is_file():
        need = f"found {free / 1e9:.1f} GB free at {folder}; expected {size / 1e9:.1f} GB"
        return f"{need}: make room, set LSAST_HOME to a folder with room, or export the bundle in fp32"
    return ""


def is_current(folder: Path) -> bool:
    """Whether the weights that were converted into `folder` are still there and the same."""
    weights = read_source(folder)
    return weights is not None and weights.is_file() and _key(weights) == folder.name


def _key(weights: Path) -> str:
    """A name for the content of `weights`: from the SHA-256 that the manifest declares, size and time of change."""
    stat, declared = weights.stat(), declared_hashes(weights.parent).get(weights.name, weights.resolve())
    return hashlib.sha256(f"{declared} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]


def _is_whole(target: Path) -> bool:
    """Whether the file is there and as it was written; it is read once in this process."""
    try:
        stat = target.stat()
        state = (target, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if state not in _checked:
            if target.with_suffix(DIGEST_SUFFIX).read_text() != file_sha256(target):
                _log.warning("%s is damaged; it is converted again", target)
                return False
            _checked.add(state)
    except OSError:
        return False
    return True


def _convert(weights: Path, slots: dict[str, Slot], target: Path) -> None:
    half = {name: slot.dtype in _HALVES for name, slot in slots.items()}
    tensors = [
        (name, "F32" if half[name] else slot.dtype, slot.shape, slot.length * (2 if half[name] else 1))
        for name, slot in slots.items()
    ]
    header = encode_header(tensors)
    size = len(header) + sum(length for *_, length in tensors)
    _log.warning(
        "converting %s to float32 in %s, %.1f GB, once; that folder may be deleted", weights, target, size / 1e9
    )
    with replace_file(target.parent / SOURCE, own=True) as handle:
        handle.write(os.fsencode(weights.resolve()))
    with weights.open("rb") as source, replace_file(target, own=True) as handle:
        handle.write(header)
        for slot in slots.values():
            source.seek(slot.offset)
            handle.write(to_float32(source.read(slot.length), slot.dtype))
    if _key(weights) != target.parent.name:
        raise BackendError(f"{weights} changed while it was converted; open the bundle again")
    with replace_file(target.with_suffix(DIGEST_SUFFIX), own=True) as handle:
        handle.write(file_sha256(target).encode())
    for other in target.parent.parent.iterdir():  # what the same file held before is as large, and of no use
        if other != target.parent and read_source(other) == weights.resolve():
            shutil.rmtree(other, ignore_errors=True)


def to_float32(data: bytes, dtype: str) -> bytes:
    """The values `data` of `dtype` (safetensors' name) as float32, if they have 16 bits; others unchanged."""
    if dtype == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32).tobytes()
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).tobytes()
    return data


def _rewritten_model(model: bytes, moved: dict[int, Slot]) -> bytes:
    """A serialized ModelProto that refers to the converted weights; `moved` maps old offsets to new slots."""
    result = []
    for number, value, raw in fields(model):
        result.append(_message_field(7, _rewritten_graph(value, moved)) if number == 7 else raw)
    return b"".join(result)


def _rewritten_graph(graph: bytes, moved: dict[int, Slot]) -> bytes:
    """A GraphProto in which 16-bit initializers are replaced by the outputs of their casts."""
    halves = set()
    for number, value, _ in fields(graph):
        if number == 5:
            tensor = _first_values(value)
            if tensor.get(2) in _HALVES.values() and tensor.get(14) == 1:  # data_type; data_location: external
                halves.add(bytes(tensor[8]))
    names, result = {}, []
    for number, value, raw in fields(graph):
        if number == 1 and _first_values(value).get(4) == b"Cast" and (source := _first_values(value)[1]) in halves:
            names[source] = _first_values(value)[2]
        elif number != 5:
            result.append(raw)
    for number, value, _ in fields(graph):
        if number == 5:
            result.append(_message_field(5, _rewritten_initializer(value, moved, names)))
    return b"".join(result)


def _rewritten_initializer(tensor: bytes, moved: dict[int, Slot], names: dict[bytes, bytes]) -> bytes:
    """A TensorProto; if its data is in the weight file, with the new offset and length."""
    entries = [_first_values(value) for number, value, _ in fields(tensor) if number == 13]
    place = {bytes(entry[1]): bytes(entry[2]) for entry in entries}
    if place.get(b"location") != WEIGHTS.encode():
        return tensor
    slot = moved[int(place[b"offset"])]
    result = []
    for number, value, raw in fields(tensor):
        if number == 2:
            result.append(_number_field(2, _FLOAT if value in _HALVES.values() else value))
        elif number == 8:
            result.append(_message_field(8, names.get(value, value)))
        elif number != 13:
            result.append(raw)
    place = {b"location": WEIGHTS.encode(), b"offset": b"%d" % slot.offset, b"length": b"%d" % slot.length}
    result += [_message_field(13, _message_field(1, key) + _message_field(2, text)) for key, text in place.items()]
    return b"".join(result)


def _first_values(message: bytes) -> dict[int, Any]:
    """The first value of each field."""
    found: dict[int, Any] = {}
    for number, value, _ in fields(message):
        found.setdefault(number, value)
    return found


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _message_field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | LENGTH_DELIMITED) + _varint(len(content)) + content
