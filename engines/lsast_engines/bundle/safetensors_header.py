"""The header of safetensors files, read and written without the tensors.

Such a file is 8 bytes of header length (little-endian), a JSON header, then raw tensors
(github.com/huggingface/safetensors, "Format").
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .json_fields import parse_json

_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit


class Slot(NamedTuple):
    """Type, shape and position of a tensor in a safetensors file."""

    dtype: str
    """safetensors' name of the element type, e.g. ``F16``."""
    shape: tuple[int, ...]
    offset: int
    """First byte, from the beginning of the file."""
    length: int
    """Bytes."""


def read_slots(path: Path) -> dict[str, Slot]:
    """The tensors of a safetensors file by name, in the order of the file; a ValueError if the header is damaged."""
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        if size > _MAX_HEADER:
            raise ValueError(f"found a header of {size} bytes; expected at most {_MAX_HEADER}")
        header = parse_json(handle.read(size))
    slots = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                slots[name] = Slot(entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"found a header that is none of safetensors ({error})") from error
    return dict(sorted(slots.items(), key=lambda item: item[1].offset))


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Length and header of a file of `tensors`: name, element type, shape and bytes of each, in the order written."""
    header: dict[str, Any] = {}
    end = 0
    for name, dtype, shape, length in tensors:
        start, end = end, end + length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
