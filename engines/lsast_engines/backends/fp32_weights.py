"""Large weights of 16 bits, unpacked to float32 in a file that backends map.

A bundle in fp16 or bf16 is computed in float32. OpenVINO (and ONNX Runtime for fp16; bf16 it can take from the file)
makes float32 constants of 16-bit weights in memory, and then packed copies of those: a Stable Diffusion 1.5 at 512 x
512 takes 12.0 GB (9.0 GB), instead of 6.9 from a bundle in fp32. So the weights are unpacked once, a tensor at a time,
into a float32 file in the cache folder, and the graph is rewritten to what it would be over that file: without casts,
other offsets. Weights below `LARGE` are left to the backend.

Graphs are protocol buffers (onnx/onnx.proto); the runtime has no onnx library, and the few fields that change are
rewritten here.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import numpy as np

from ..bundle.safetensors_header import Slot, encode_header, read_slots
from ..errors import BackendError
from ..files import cache_home, replace_file
from .protobuf import fields, first_values, message_field, number_field

LARGE = 1 << 30
"""Bytes of a weight file from which it is worth it."""

WEIGHTS = "base.safetensors"
"""The file of all weights of a bundle."""

_HALVES = {"F16": 10, "BF16": 16}
"""16-bit types by safetensors' name, with their number in ONNX."""
_FLOAT = 1
_log = logging.getLogger("lsast.unpacked")


def unpacked_graph(path: Path, cache: Path | None = None, kinds: tuple[str, ...] = ("F16", "BF16")) -> Path:
    """The graph to open in the place of `path`: itself, or one over unpacked weights.

    Args:
        path: an ONNX file of a bundle.
        cache: folder for what is unpacked; None is ``unpacked`` in ``$LSAST_HOME``, without LSAST_HOME in
            ``lsast`` of the XDG cache folder.
        kinds: 16-bit types to unpack; weights of others are left alone.

    Raises:
        BackendError: the folder's disk has no room for the weights.
    """
    weights = path.parent / WEIGHTS
    if not weights.is_file() or weights.stat().st_size < LARGE:
        return path
    slots = read_slots(weights)
    if not any(slot.dtype in kinds for slot in slots.values()):
        return path
    folder = (cache or cache_home() / "unpacked") / _key(weights)
    target = folder / WEIGHTS
    if not target.is_file():
        _unpack(weights, slots, target)
    moved = {old.offset: new for old, new in zip(slots.values(), read_slots(target).values(), strict=True)}
    with replace_file(folder / path.name) as handle:
        handle.write(_rewritten(path.read_bytes(), moved))
    return folder / path.name


def _key(weights: Path) -> str:
    """A name for what `weights` holds that costs no reading of it."""
    facts = weights.stat()
    return hashlib.sha256(f"{weights.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:16]


def _unpack(weights: Path, slots: dict[str, Slot], target: Path) -> None:
    half = {name: slot.dtype in _HALVES for name, slot in slots.items()}
    tensors = [
        (name, "F32" if half[name] else slot.dtype, slot.shape, slot.length * (2 if half[name] else 1))
        for name, slot in slots.items()
    ]
    header = encode_header(tensors)
    end = len(header) + sum(length for *_, length in tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < end:
        raise BackendError(
            f"found {free / 1e9:.1f} GB free at {target.parent}; expected {end / 1e9:.1f} GB to unpack {weights}: make "
            "room, set LSAST_HOME to a folder with room, or export the bundle in fp32"
        )
    _log.warning(
        "unpacking %s to %s: %.1f GB, once; delete that folder to have the room back", weights, target.parent, end / 1e9
    )
    with weights.open("rb") as source, replace_file(target) as handle:
        handle.write(header)
        for slot in slots.values():
            source.seek(slot.offset)
            handle.write(_widened(source.read(slot.length), slot.dtype))


def _widened(data: bytes, dtype: str) -> bytes:
    """Values of `dtype` as float32, if they have 16 bits."""
    if dtype == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32).tobytes()
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).tobytes()
    return data


def _rewritten(model: bytes, moved: dict[int, Slot]) -> bytes:
    """A serialized ModelProto over the unpacked weights; `moved` gives the new slot by the old first byte."""
    result = []
    for number, _, value, raw in fields(model):
        result.append(message_field(7, _graph(value, moved)) if number == 7 else raw)
    return b"".join(result)


def _graph(graph: bytes, moved: dict[int, Slot]) -> bytes:
    """A GraphProto: 16-bit initializers become the outputs of their casts, which go."""
    halves = set()
    for number, _, value, _ in fields(graph):
        if number == 5:
            tensor = first_values(value)
            if tensor.get(2) in _HALVES.values() and tensor.get(14) == 1:  # data_type; data_location: external
                halves.add(bytes(tensor[8]))
    names, result = {}, []
    for number, _, value, raw in fields(graph):
        if number == 1 and first_values(value).get(4) == b"Cast" and (source := first_values(value)[1]) in halves:
            names[source] = first_values(value)[2]
        elif number != 5:
            result.append(raw)
    for number, _, value, _ in fields(graph):
        if number == 5:
            result.append(message_field(5, _initializer(value, moved, names)))
    return b"".join(result)


def _initializer(tensor: bytes, moved: dict[int, Slot], names: dict[bytes, bytes]) -> bytes:
    """A TensorProto; one that lies in the weight file is pointed to its new place there."""
    place = {bytes(first_values(v)[1]): bytes(first_values(v)[2]) for number, _, v, _ in fields(tensor) if number == 13}
    if place.get(b"location") != WEIGHTS.encode():
        return tensor
    slot = moved[int(place[b"offset"])]
    result = []
    for number, _, value, raw in fields(tensor):
        if number == 2:
            result.append(number_field(2, _FLOAT if value in _HALVES.values() else value))
        elif number == 8:
            result.append(message_field(8, names.get(value, value)))
        elif number != 13:
            result.append(raw)
    entries = {b"location": WEIGHTS.encode(), b"offset": b"%d" % slot.offset, b"length": b"%d" % slot.length}
    result += [message_field(13, message_field(1, key) + message_field(2, text)) for key, text in entries.items()]
    return b"".join(result)
