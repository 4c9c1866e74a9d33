"""What products of 8 bits cost in quality: ModelOpt's denoiser against float32, on the same seeds, on the CPU.

    python benchmarks/eight_bit.py PHOTOGRAPHS OUT --to int8 --to fp8 [--smooth 0.5] [--pictures 6] [--size 512]

Needs the extras modelopt and export. Pictures alternate: every second one calibrates, the others judge. Each graph is
judged as ModelOpt wrote it, with the rest in float32, and as engines are compiled from it, with the rest in fp16. Of
seconds nothing is said: no CPU computes as a GPU does.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
from pathlib import Path
from typing import Any

from lsast_engines.bundle import Bundle, find_bundle
from lsast_export.eight_bit import quality, quantise_denoiser
from lsast_export.half_graph import write_half_graph
from lsast_export.trial import find_contents


def measure(
    bundle: Bundle, kind: Any, photographs: Path, pictures: int, size: int, out: Path, smooth: float | None
) -> None:
    contents, _ = find_contents(photographs, 2 * pictures, size)
    file = quantise_denoiser(bundle, contents[::2], kind, out / kind / "denoiser.onnx", print, smooth)
    halves = out / f"{kind}-halves"
    halves.mkdir(parents=True, exist_ok=True)
    shutil.copy(file.with_suffix(".data"), halves)
    write_half_graph(file, halves / "denoiser.onnx")
    for rest, graph in (("fp32", file), ("fp16", halves / "denoiser.onnx")):
        cost = quality(bundle, graph, contents[1::2])
        row = {"bundle": bundle.manifest.name, "kind": kind, "smooth": smooth, "rest": rest}
        gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        row |= {"pictures": pictures, "size": size, "peak_gb": round(gigabytes, 2)}
        print(json.dumps(row | {name: round(value, 2) for name, value in cost._asdict().items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--to", action="append", choices=["int8", "fp8"], required=True)
    parser.add_argument("--bundle")
    parser.add_argument("--smooth", type=float)
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    bundle = Bundle.open(find_bundle(options.bundle))
    for kind in options.to:
        measure(bundle, kind, options.photographs, options.pictures, options.size, options.out, options.smooth)


if __name__ == "__main__":
    main()
