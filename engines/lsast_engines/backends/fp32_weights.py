"""Large 16-bit weights, converted once to a float32 file that backends can map.

The graphs of a bundle in fp16 or bf16 cast its weights to float32. OpenVINO, and ONNX Runtime with fp16, expand such
weights in memory and then make packed copies, so that they need more memory than for a bundle in fp32. Therefore the
weights are converted, a tensor at a time, into a float32 file in the cache folder, and the graph is rewritten for that
file: without casts, with other offsets.
"""

import functools
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
from ..files import FOR_OTHERS_TO_READ, MAKE_OWN, cache_home, file_sha256, make_folder, replace_file, written_by_others
from .graph_cache import SOURCE, read_source
from .onnx_file import encode, values

MIN_BYTES = 1 << 30
"""Minimum size of a weight file to convert; smaller ones are left to the backend."""

_WEIGHTS, _DIGEST_SUFFIX = "base.safetensors", ".sha256"
_FLOAT, _HALVES = 1, {"F16": 10, "BF16": 16}  # TensorProto.DataType, by safetensors' name
_EXTERNAL = 1  # TensorProto.DataLocation of a weight in a file

_log = logging.getLogger("lsast.fp32_weights")


def with_fp32_weights(path: Path, cache: Path | None = None, dtypes: tuple[str, ...] = ("F16", "BF16")) -> Path:
    """The graph file to open for `path`: itself, or its rewritten copy beside converted weights.

    Weights of `dtypes`, by safetensors' name, are converted into the folder `cache`; None is ``fp32`` in the user's
    cache folder. Without a folder of its own, with room, the backend expands them in memory, with a warning.

    Raises:
        BackendError: `path` is no graph of a bundle, or its weights change meanwhile.
    """
    weights = path.parent / _WEIGHTS
    if not weights.is_file() or weights.stat().st_size < MIN_BYTES:
        return path
    slots = read_slots(weights)
    if not any(slot.dtype in dtypes for slot in slots.values()):
        return path
    folder = (cache or cache_home() / "fp32") / _key(weights)
    if fault := _folder_fault(folder, cache, sum(slot.length * 2 for slot in slots.values())):
        _log.warning("painting needs more memory: %s", shown(fault))
        return path
    target, graph = folder / _WEIGHTS, folder / path.name
    if not _is_whole(target):
        _convert(weights, slots, target)
    moved = {old.offset: new for old, new in zip(slots.values(), read_slots(target).values(), strict=True)}
    try:
        model = _rewritten_model(path.read_bytes(), moved)
    except (LookupError, ValueError, TypeError, AttributeError) as error:  # without a field, or of other wire types
        raise BackendError(f"{path} is not a graph of a bundle ({error}); export it again") from error
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
    if (free := shutil.disk_usage(folder).free) < size and not (folder / _WEIGHTS).is_file():
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
        written = target.with_suffix(_DIGEST_SUFFIX).read_bytes()
        whole = written == _sha256(target, stat.st_ino, stat.st_size, stat.st_mtime_ns).encode()
    except OSError:
        return False
    if not whole:
        _log.warning("%s is damaged; it is converted again", target)
    return whole


@functools.cache
def _sha256(path: Path, *_: int) -> str:
    return file_sha256(path)


def _convert(weights: Path, slots: dict[str, Slot], target: Path) -> None:
    tensors = [
        (name, "F32", slot.shape, slot.length * 2)
        if slot.dtype in _HALVES
        else (name, slot.dtype, slot.shape, slot.length)
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
            handle.write(_to_float32(source.read(slot.length), slot.dtype))
    if _key(weights) != target.parent.name:
        raise BackendError(f"{weights} changed while it was converted; open the bundle again")
    with replace_file(target.with_suffix(_DIGEST_SUFFIX), own=True) as handle:
        handle.write(file_sha256(target).encode())
    for other in target.parent.parent.iterdir():  # what the same file held before is as large, and of no use
        if other != target.parent and read_source(other) == weights.resolve():
            shutil.rmtree(other, ignore_errors=True)


def _to_float32(data: bytes, dtype: str) -> bytes:
    if dtype == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32).tobytes()
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).tobytes()
    return data


def _rewritten_model(model: bytes, moved: dict[int, Slot]) -> bytes:
    """A ModelProto that reads the converted weights, in place of their casts; `moved` maps old offsets to new slots."""
    fields = values(model)
    graph = values(fields[7][0])
    tensors = [(raw, values(raw)) for raw in graph[5]]
    halves = {tensor[8][0] for _, tensor in tensors if tensor[2][0] in _HALVES.values() and tensor[14] == [_EXTERNAL]}
    nodes = [(raw, values(raw)) for raw in graph[1]]
    casts = {node[1][0]: node[2][0] for _, node in nodes if node[4] == [b"Cast"] and node[1][0] in halves}
    graph[1] = [raw for raw, node in nodes if node[4] != [b"Cast"] or node[1][0] not in halves]
    graph[5] = [_rewritten_initializer(raw, tensor, moved, casts) for raw, tensor in tensors]
    fields[7] = [encode(graph)]
    return encode(fields)


def _rewritten_initializer(
    raw: bytes, tensor: dict[int, list[Any]], moved: dict[int, Slot], casts: dict[bytes, bytes]
) -> bytes:
    """A TensorProto; if its data is in the weight file, with the new place, and the name that its cast had."""
    place = {entry[1][0]: entry[2][0] for entry in map(values, tensor[13])}
    if place.get(b"location") != _WEIGHTS.encode():
        return raw
    slot, (name,) = moved[int(place[b"offset"])], tensor[8]
    place = {b"location": _WEIGHTS.encode(), b"offset": b"%d" % slot.offset, b"length": b"%d" % slot.length}
    kind = [_FLOAT] if tensor[2][0] in _HALVES.values() else tensor[2]
    entries = [encode({1: [key], 2: [text]}) for key, text in place.items()]
    return encode({**tensor, 2: kind, 8: [casts.get(name, name)], 13: entries})
