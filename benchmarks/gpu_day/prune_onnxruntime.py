#!/usr/bin/env python3
"""Make onnxruntime-gpu small enough to carry to one kind of card: machine code of one SM only, packed as .tar.xz.

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 -d wheels onnxruntime-gpu==1.31.1
    python prune_onnxruntime.py wheels/onnxruntime_gpu-*.whl onnxruntime_sm90.tar.xz --sm 90

The CUDA provider is 284 MB, nearly all of it fat binaries for many SMs. Entries of other SMs are blanked, not cut, so
that every offset holds; xz then packs the zeros away (about 40 MB for SM 9.0, 51 MB with the rest). Containers
that hold code of this SM alone are blanked too, since no other SM can need them through JIT; --keep-alone keeps them
(+44 MB) if a kernel turns out missing ("no kernel image is available"). On the card: unpack, put the folder on
PYTHONPATH, `import torch` first, so that its CUDA and cuDNN libraries are found.
Loaded as far as the original does against a stub of the driver; never run on a card when this was written.
"""

from __future__ import annotations

import argparse
import io
import re
import struct
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
LEFT_OUT = re.compile(
    r"onnxruntime/(transformers|tools|quantization|backend|datasets)/|providers_tensorrt|\.dist-info/"
)
MAGIC = b"\x50\xed\x55\xba"


def prune(library: bytes, sm: int, keep_alone: bool) -> bytearray:
    """Blank the machine code of every SM but `sm` in the section .nv_fatbin."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        sections = subprocess.run(["readelf", "-SW", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"\.nv_fatbin\s+PROGBITS\s+\w+\s+(\w+)\s+(\w+)", sections)
    if match is None:
        raise SystemExit("found no section .nv_fatbin; is this the CUDA provider?")
    offset, size = int(match[1], 16), int(match[2], 16)
    data = bytearray(library)
    place, kept = offset, 0
    while (place := data.find(MAGIC, place, offset + size)) >= 0:
        _, _, header, length = struct.unpack_from("<IHHQ", data, place)
        entry, stop, entries = place + header, place + header + length, []
        while entry < stop:
            _, _, head, body = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            entries.append((entry + head, body, arch))
            entry += head + body
        alone = [arch for *_, arch in entries] == [sm]
        for start, body, arch in entries:
            if arch == sm and (keep_alone or not alone):
                kept += body
            else:
                data[start : start + body] = bytes(body)
        place = stop
    print(f"machine code of SM {sm}: {kept / 1e6:.1f} MB kept")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument("--keep-alone", action="store_true")
    chosen = parser.parse_args()
    with zipfile.ZipFile(chosen.wheel) as wheel, tarfile.open(chosen.out, "w:xz", preset=6) as out:
        for name in wheel.namelist():
            if name.endswith("/") or LEFT_OUT.search(name):
                continue
            content: bytes | bytearray = wheel.read(name)
            if name == PROVIDER:
                content = prune(bytes(content), chosen.sm, chosen.keep_alone)
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755
            out.addfile(info, io.BytesIO(bytes(content)))
    print(f"{chosen.out}: {chosen.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
