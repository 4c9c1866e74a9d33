"""ONNX files without the onnx package: their fields, and checks of them before OpenVINO parses them.

An ONNX file is a protocol buffer (protobuf.dev/programming-guides/encoding); field numbers are those of
onnx/onnx.proto. OpenVINO's parser may crash on files that are damaged or hostile, so `check_graph` makes those checks
of `onnx.checker` that a parser relies on, for graphs as `lsast-export` writes them: one operator set, no graphs inside
graphs, no functions. ONNX Runtime makes such checks by itself.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle.json_fields import parse_json
from ..errors import BackendError, fault_list, shown

OPSET = 18
"""Version of ONNX's operators that `OPERATORS` lists."""

OPERATORS = Path(__file__).with_name("onnx_operators.json")
"""Operators without graphs inside, by name: the least and most inputs, the least and most outputs, -1 for no limit, and
the attributes with their type (AttributeProto.AttributeType) and whether they are required."""

_MAX_FAULTS = 10
_MAX_RANK = 8
_MAX_ELEMENTS = 1 << 40

# Bytes of an element by TensorProto.DataType.
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
# The field that holds an attribute's value, by its type: float, int, text, tensor, floats, ints, texts.
_VALUE_FIELDS = {1: 2, 2: 3, 3: 4, 4: 5, 6: 7, 7: 8, 8: 9}
_TENSOR, _LISTS = 4, (6, 7, 8)  # types of attributes: a tensor; those that may be empty or hold several values


def values(message: bytes) -> defaultdict[int, list[Any]]:
    """All values of every field of a message, in their order: an int, or bytes; a ValueError if it is damaged."""
    found: defaultdict[int, list[Any]] = defaultdict(list)
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        value: Any
        if key & 7 == 0:
            value, position = _read_varint(message, position)
        else:
            if key & 7 == 2:
                size, position = _read_varint(message, position)
            elif (size := {1: 8, 5: 4}.get(key & 7, -1)) < 0:
                raise ValueError(f"a field of wire type {key & 7}")
            value, position = message[position : position + size], position + size
            if position > len(message):
                raise ValueError("a field that ends behind its message")
        found[key >> 3].append(value)
    return found


def encode(fields: Mapping[int, list[Any]]) -> bytes:
    """The message with these `values`, none of which is a number of fixed width."""
    parts = []
    for number, found in fields.items():
        for value in found:
            if isinstance(value, int):
                parts += [_varint(number << 3), _varint(value)]
            else:
                parts += [_varint(number << 3 | 2), _varint(len(value)), value]
    return b"".join(parts)


def check_graph(path: Path) -> None:
    """Check the ONNX file `path`, whose weights lie beside it. A `BackendError` lists the first faults: it is damaged,
    or uses what no graph of a bundle does."""
    try:
        faults = _model_faults(path.read_bytes(), path.parent)
    except (ValueError, TypeError, AttributeError) as error:  # of other wire types than expected, too
        faults = [str(error)]
    if faults:
        raise BackendError(fault_list(f"{path} is not a graph of a bundle; export it again:", faults[:_MAX_FAULTS]))


@functools.cache
def _operators() -> dict[str, Any]:
    operators: dict[str, Any] = parse_json(OPERATORS.read_bytes())
    return operators


def _model_faults(model: bytes, folder: Path) -> list[str]:
    found = values(model)
    faults = []
    opsets = [values(entry) for entry in found[8]]
    versions = [entry[2][-1] if entry[2] else 0 for entry in opsets if _text(entry[1]) in ("", "ai.onnx")]
    if versions != [OPSET] or len(opsets) != 1:
        faults.append(f"found operators of version {versions}; expected {OPSET} of ai.onnx alone")
    if len(found[7]) != 1 or found[20] or found[25]:
        faults.append("found no graph, more than one, functions or training; expected one graph")
    for graph in found[7]:
        faults += _graph_faults(graph, folder)
    return faults


def _graph_faults(graph: bytes, folder: Path) -> list[str]:
    found = values(graph)
    faults = ["found sparse weights; expected dense ones"] if found[15] else []
    known = {""}  # what is computed so far; an input that is left out has an empty name
    for value_info in found[11]:
        faults += _define(_text(values(value_info)[1]), known)
    for tensor in found[5]:
        name = _text(values(tensor)[8])
        faults += [f"weight {shown(name)}: {fault}" for fault in _tensor_faults(tensor, folder)] + _define(name, known)
    for node in found[1]:
        faults += _node_faults(node, known, folder)
    for value_info in found[12]:
        if not (name := _text(values(value_info)[1])) or name not in known:
            faults.append(f"output {shown(name)}: no node computes it")
    for value_info in found[11] + found[12] + found[13]:
        faults += _type_faults(value_info)
    return faults


def _define(name: str, known: set[str]) -> list[str]:
    faults = [f"{shown(name) or 'a value without a name'}: defined twice"] if name in known else []
    known.add(name)
    return faults


def _node_faults(node: bytes, known: set[str], folder: Path) -> list[str]:
    found = values(node)
    kind = _text(found[4])
    if kind not in _operators() or _text(found[7]) not in ("", "ai.onnx"):
        return [f"found operator {shown(kind)} of {shown(_text(found[7])) or 'ai.onnx'}; expected another"]
    *counts, attributes = _operators()[kind]
    inputs, outputs = ([_text([name]) for name in found[side]] for side in (1, 2))
    where = f"{kind} {shown(next(iter(outputs), ''))}"
    faults = [f"{where}: no earlier node computes {shown(name)}" for name in inputs if name not in known]
    for side, names, (least, most) in (("inputs", inputs, counts[:2]), ("outputs", outputs, counts[2:])):
        if not least <= len(names) <= (len(names) if most < 0 else most) or "" in names[:least]:
            faults.append(f"{where}: found {side} {shown(names)}; expected at least {least}, at most {most}")
    for name in filter(None, outputs):
        faults += _define(name, known)
    given: set[str] = set()
    for attribute in found[5]:
        faults += [f"{where}: {fault}" for fault in _attribute_faults(attribute, attributes, given, folder)]
    missing = [name for name, (_, required) in attributes.items() if required and name not in given]
    return faults + [f"{where}: attribute {name} is missing" for name in missing]


def _attribute_faults(attribute: bytes, expected: dict[str, list[Any]], given: set[str], folder: Path) -> list[str]:
    found = values(attribute)
    name = _text(found[1])
    kind, _ = expected.get(name, (0, False))
    if kind not in _VALUE_FIELDS or name in given:
        return [f"attribute {shown(name)} is unknown or given twice"]
    given.add(name)
    others = [field for field in (*_VALUE_FIELDS.values(), 10, 11, 14, 15, 21, 22, 23) if field != _VALUE_FIELDS[kind]]
    held = found[_VALUE_FIELDS[kind]]
    if found[20] != [kind] or any(found[field] for field in others) or (kind not in _LISTS and len(held) != 1):
        return [f"attribute {name} has a value of another type than {kind}"]
    tensors = held if kind == _TENSOR else []
    return [f"attribute {name}: {fault}" for tensor in tensors for fault in _tensor_faults(tensor, folder)]


def _tensor_faults(tensor: bytes, folder: Path) -> list[str]:
    """Faults of a TensorProto: its shape, and whether it holds as many bytes or elements."""
    found = values(tensor)
    shape, kind = _numbers(found[1]), found[2][-1] if found[2] else 0
    if kind not in _ITEM_BYTES or len(shape) > _MAX_RANK or min(shape, default=0) < 0:
        return [f"found type {kind} and shape {shape[: _MAX_RANK + 1]}; expected sizes of numbers"]
    if (count := math.prod(shape)) > _MAX_ELEMENTS:
        return [f"found shape {shape}; expected fewer elements"]
    size = count * _ITEM_BYTES[kind]
    if found[14] and found[14][-1] == 1:
        return _external_faults(found[13], size, folder)
    if found[9]:
        return [] if [len(found[9][0])] == [size] and len(found[9]) == 1 else [f"expected {size} bytes of data"]
    listed = sum(len(_numbers(found[field])) for field in (5, 7, 11))
    for field, width in ((4, 4), (10, 8)):
        listed += sum(1 if len(value) == width else len(value) // width for value in found[field])
    return [] if listed == count else [f"found {listed} elements; expected {count}"]


def _external_faults(entries: list[bytes], size: int, folder: Path) -> list[str]:
    """Faults of the place of a weight in a file: it lies in a file of the folder, and has the size of the weight."""
    place = {_text(entry[1]): _text(entry[2]) for entry in map(values, entries)}
    name = place.get("location", "")
    file = folder / name
    if Path(name).name != name or name in ("", ".", "..") or not file.is_file():
        return [f"found data in {shown(name)!r}; expected the name of a file in the bundle"]
    offset, length = (int(place.get(key, default)) for key, default in (("offset", "0"), ("length", str(size))))
    if length != size or offset < 0 or offset + length > file.stat().st_size:
        return [f"found {length} bytes at {offset} of {name}; expected {size} within the file"]
    return []


def _type_faults(value_info: bytes) -> list[str]:
    """Faults of a ValueInfoProto: it is a tensor of numbers, and no axis is negative."""
    found = values(value_info)
    for kind in found[2]:
        for tensor_type in values(kind)[1]:
            tensor = values(tensor_type)
            axes = [axis for shape in tensor[2] for axis in values(shape)[1]]
            sizes = _numbers([size for axis in axes for size in values(axis)[1]])
            if tensor[1] and tensor[1][-1] in _ITEM_BYTES and len(axes) <= _MAX_RANK and min(sizes, default=0) >= 0:
                return []
    return [f"{shown(_text(found[1]))}: expected a tensor of numbers"]


def _text(found: list[Any]) -> str:
    """The last value of a field as text; empty without one."""
    return str(found[-1], "utf-8") if found else ""


def _numbers(found: list[Any]) -> list[int]:
    """The whole numbers of a repeated field, packed or not, signed with 64 bits."""
    result = []
    for value in found:
        if isinstance(value, int):
            result.append(value)
            continue
        position = 0
        while position < len(value):
            number, position = _read_varint(value, position)
            result.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in result]


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number of variable length at `position`, and the position behind it."""
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            raise ValueError("a number that is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, position
    raise ValueError("a number of more than 64 bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
