"""Reading protocol buffers, such as ONNX files, without a library.

protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

LENGTH_DELIMITED = 2
"""Wire type of texts, bytes, messages and packed numbers."""

_WIDTHS = {1: 8, 5: 4}
"""Bytes of the wire types of fixed width."""


def fields(message: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """Number, value and raw bytes of every field: the value is an int, or bytes.

    Raises:
        ValueError: the message is cut off or damaged.
    """
    position = 0
    while position < len(message):
        begin = position
        key, position = read_varint(message, position)
        wire_type = key & 7
        value: Any
        if wire_type == 0:
            value, position = read_varint(message, position)
        else:
            if wire_type == LENGTH_DELIMITED:
                size, position = read_varint(message, position)
            elif (size := _WIDTHS.get(wire_type, -1)) < 0:
                raise ValueError(f"a field of wire type {wire_type}")
            value, position = message[position : position + size], position + size
            if position > len(message):
                raise ValueError("a field that ends behind its message")
        yield key >> 3, value, message[begin:position]


def values(message: bytes) -> defaultdict[int, list[Any]]:
    """All values of every field, in their order.

    Raises:
        ValueError: see `fields`.
    """
    found: defaultdict[int, list[Any]] = defaultdict(list)
    for number, value, _ in fields(message):
        found[number].append(value)
    return found


def numbers(found: list[Any]) -> list[int]:
    """The whole numbers of a repeated field, packed or not, signed with 64 bits.

    Raises:
        ValueError: see `fields`.
    """
    result = []
    for value in found:
        if isinstance(value, int):
            result.append(value)
            continue
        position = 0
        while position < len(value):
            number, position = read_varint(value, position)
            result.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in result]


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number of variable length at `position`, and the position behind it.

    Raises:
        ValueError: it has more than 64 bits, or is cut off.
    """
    value = shift = 0
    while shift < 64:
        if position >= len(data):
            raise ValueError("a number that is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, position
        shift += 7
    raise ValueError("a number of more than 64 bits")
