"""Strategies of hypothesis for files that are almost right."""

import copy
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from PIL import Image

ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from([10**400, -(10**30), 2**31, 2**63, 0, -1, math.nan, math.inf, 1e308, 5e-324]),
    st.sampled_from(["", " ", "\ud800", "\0", "../../x", "/etc/passwd", "x" * 300, "1" * 5000, "\x1b[2J", "é"]),
    st.sampled_from([[], {}, [[]], [1] * 9, {"": ""}, [None], [[[[[[1]]]]]]]),
)
"""JSON values of which a reader expects few."""


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside `value` with every key or index of it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three edits: something replaced, removed, renamed, or put in the place of another."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "copy"]))
        if kind == "replace":
            holder[key] = copy.deepcopy(draw(ODD))
        elif kind == "remove":
            del holder[key]
        elif kind == "copy":
            other, index = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = copy.deepcopy(other[index])
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6) | st.sampled_from(["name", "format"]))] = holder.pop(key)
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with up to three edits: bytes changed, removed or inserted, or the end cut off; often none."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2, 3]))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["change", "change", "remove", "insert", "cut"]))
        piece = b"" if kind in ("remove", "cut") else draw(st.binary(min_size=1, max_size=6))
        end = len(data) if kind == "cut" else place + {"change": len(piece), "remove": 4}.get(kind, 0)
        data = data[:place] + piece + data[end:]
    return data


@st.composite
def json_texts(draw: st.DrawFn, value: Any) -> str:
    """A JSON text that is almost the one of `value`."""
    text = json.dumps(draw(st.just(value) | edited(value) | edited(value)))
    return draw(damaged(text.encode())).decode("utf-8", "surrogateescape")


@st.composite
def safetensors_files(draw: st.DrawFn, data: bytes, key: str) -> bytes:
    """Almost the safetensors file `data`, whose metadata has a JSON text under `key`."""
    (length,) = struct.unpack("<Q", data[:8])
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = draw(st.sampled_from(["inner", "inner", "inner", "outer", "bytes"]))
    if what == "inner":
        header["__metadata__"][key] = draw(json_texts(json.loads(header["__metadata__"][key])))
    if what == "outer":
        header = draw(edited(header))
    text = json.dumps(header).encode()
    if what == "bytes":
        return draw(damaged(struct.pack("<Q", len(text)) + text + tensors))
    return struct.pack("<Q", len(text)) + text + tensors


@st.composite
def picture_files(draw: st.DrawFn) -> bytes:
    """The bytes of almost a picture file, of any format that Pillow writes and we read."""
    form, modes = draw(st.sampled_from(PICTURES))
    image = Image.new(draw(st.sampled_from(modes)), (draw(st.integers(1, 40)), draw(st.integers(1, 40))))
    arguments: dict[str, Any] = {}
    if draw(st.booleans()):
        arguments["icc_profile"] = draw(st.binary(max_size=40))
    if draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 65535))
        arguments["exif"] = exif
    held = io.BytesIO()
    try:
        image.save(held, form, **arguments)
    except Exception:  # not every format takes all
        held = io.BytesIO()
        image.save(held, form)
    return draw(damaged(held.getvalue()))


PICTURES = [
    ("PNG", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
    ("JPEG", ["L", "RGB", "CMYK"]),
    ("WEBP", ["RGB", "RGBA"]),
    ("TIFF", ["1", "L", "LA", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"]),
    ("GIF", ["L", "P", "RGB"]),
    ("BMP", ["1", "L", "RGB", "RGBA"]),
    ("PPM", ["1", "L", "RGB", "I;16"]),
    ("TGA", ["1", "L", "P", "RGB", "RGBA"]),
    ("ICO", ["RGBA"]),
    ("JPEG2000", ["L", "LA", "RGB", "RGBA"]),
    ("SGI", ["L", "RGB", "RGBA"]),
    ("DDS", ["L", "RGB", "RGBA"]),
    ("PCX", ["1", "L", "P", "RGB"]),
]


def png_file(width: int, height: int, bits: int = 8, colour: int = 2, rows: bytes = b"\0") -> bytes:
    """A PNG that declares a size, bits of a channel and a colour type, and holds `rows`, filter bytes with them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks.items())
