"""The few lines of protocol buffers (protobuf.dev/programming-guides/encoding) that ONNX files are read and made with.

The runtime has no onnx library: what it has to know of a graph is a handful of fields of ``onnx/onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_LENGTH = 2  # wire type of texts, bytes and messages


def fields(message: bytes) -> Iterator[tuple[int, int, Any, bytes]]:
    """Number, wire type, value and raw bytes of every field."""
    position = 0
    while position < len(message):
        begin = position
        key, position = _read_varint(message, position)
        wire = key & 7
        value: Any
        if wire == 0:
            value, position = _read_varint(message, position)
        else:
            if wire == _LENGTH:
                size, position = _read_varint(message, position)
            else:
                size = {1: 8, 5: 4}[wire]
            value, position = message[position : position + size], position + size
        yield key >> 3, wire, value, message[begin:position]


def first_values(message: bytes) -> dict[int, Any]:
    """The first value of each field."""
    found: dict[int, Any] = {}
    for number, _, value, _ in fields(message):
        found.setdefault(number, value)
    return found


def varint(value: int) -> bytes:
    """A whole number, 0 or more."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def number_field(number: int, value: int) -> bytes:
    """The field `number` with a whole number, 0 or more."""
    return varint(number << 3) + varint(value)


def message_field(number: int, content: bytes) -> bytes:
    """The field `number` with a text, bytes or a message."""
    return varint(number << 3 | _LENGTH) + varint(len(content)) + content


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
