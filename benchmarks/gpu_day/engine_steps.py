"""The steps of the call `engines`: ONNX Runtime on the card, against its CPU provider and as a clock.

    python -m benchmarks.gpu_day.engine_steps prepare SD15_BUNDLE     # before: into benchmarks/gpu_day/sd15/, 1.4 MB

A card's machine has no weights of Stable Diffusion 1.5: the step `sd15` draws a weight file of the right layout there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from lsast_engines.backends import onnxruntime
from lsast_engines.backends.onnxruntime import GPU_SUFFIX, OnnxRuntimeEngine
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.bundle.graph_spec import DENOISER, REQUIRED_GRAPHS, GraphSpec

FOLDER = Path(__file__).parent / "sd15"
WEIGHTS = "base.safetensors"
Feeds = dict[str, np.ndarray]


def graphs(device: str, cells: int) -> dict[str, Any]:
    """Largest relative difference of mini's graphs on the device from the CPU in fp32, by graph and compute dtype."""
    bundle = Bundle.open(EMBEDDED)
    found: dict[str, Any] = {}
    for name in REQUIRED_GRAPHS:
        path, spec = bundle.graph_path(name), bundle.manifest.graphs[name]
        feeds = random_feeds(spec, cells)
        with closing(OnnxRuntimeEngine(path, spec, "cpu", None)) as engine:
            expected = engine(feeds)
            for dtype in ("fp32", "fp16"):
                with closing(OnnxRuntimeEngine(path, spec, device, None, dtype)) as other:  # type: ignore[arg-type]
                    runs = [{key: value.copy() for key, value in other(feeds).items()} for _ in range(3)]
                found[f"{name} {dtype}"] = _error(runs[0], expected)
                found[f"{name} {dtype} replays differ by"] = max(_error(run, runs[0]) for run in runs)
    return found


def painting(device: str, size: int) -> dict[str, Any]:
    """A painting on the device: seconds of a second one, and PSNR to that of the CPU in dB."""
    import lsast
    from lsast_engines.images import psnr

    rows, columns = np.mgrid[0:size, 0:size]
    picture = np.stack([rows % 256, columns % 256, (rows * columns // size) % 256], axis=-1).astype(np.uint8)
    pixels = {}
    seconds = 0.0
    for where in dict.fromkeys(("cpu", device)):
        with lsast.load(device=where) as stylizer:
            stylizer.stylize(picture, size=size)
            begin = time.perf_counter()
            pixels[where] = np.asarray(stylizer.stylize(picture, size=size).image)
            seconds = time.perf_counter() - begin
    value = psnr(pixels["cpu"], pixels[device]) if device != "cpu" else float("inf")
    return {"seconds": seconds, "psnr_db": value if np.isfinite(value) else None}


def sd15(device: str, cells: int, plain: bool, repeats: int) -> dict[str, Any]:
    """Milliseconds of a guided step of SD 1.5 with its ControlNet, and the difference of a step from the CPU."""
    folder, manifest = (EMBEDDED, None) if device == "cpu" else (FOLDER, FOLDER / "spec.json")
    bundle = Bundle.open(EMBEDDED)
    spec = bundle.manifest.graphs[DENOISER] if manifest is None else _read_spec(manifest)
    if device != "cpu":
        draw_weights(folder)
    if plain:
        onnxruntime._CUDA_OPTIONS["enable_cuda_graph"] = "0"
    path, feeds = folder / f"{DENOISER}.onnx", random_feeds(spec, cells)
    with closing(OnnxRuntimeEngine(path, spec, device, None, "fp16")) as engine:
        begin = time.perf_counter()
        engine.bind_inputs({name: value for name, value in feeds.items() if name not in ("latent", "timestep")})
        step = {name: feeds[name] for name in ("latent", "timestep")}
        for _ in range(3):
            found = {name: value.copy() for name, value in engine(step).items()}
        prepared = time.perf_counter() - begin
        groups = []
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(repeats):
                engine(step)
            groups.append(1e3 * (time.perf_counter() - begin) / repeats)
    result = {"ms": statistics.median(groups), "spread": max(groups) - min(groups), "prepared_s": prepared}
    if not plain:
        with closing(OnnxRuntimeEngine(path, spec, "cpu", None)) as engine:
            result["difference_from_cpu"] = _error(found, engine(feeds))
    return result


def prepare(bundle: Path) -> None:
    """Copy the two graphs of a bundle's denoiser, and its spec, without weights."""
    FOLDER.mkdir(exist_ok=True)
    for suffix in (".onnx", GPU_SUFFIX):
        (FOLDER / f"{DENOISER}{suffix}").write_bytes((bundle / f"{DENOISER}{suffix}").read_bytes())
    manifest = json.loads((bundle / "manifest.json").read_text())
    (FOLDER / "spec.json").write_text(json.dumps(manifest["graphs"][DENOISER]))


def draw_weights(folder: Path) -> None:
    """A weight file that the graphs of `folder` refer to: random matrices that keep the size of what they multiply."""
    import onnx

    target = folder / WEIGHTS
    if target.is_file():
        return
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 22, dtype=np.float32)
    model = onnx.load(folder / f"{DENOISER}.onnx", load_external_data=False)
    with target.open("wb") as handle:
        for tensor in model.graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if not place:
                continue
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            count = int(np.prod(tensor.dims))
            if len(tensor.dims) > 1:
                values = np.resize(block, count) * np.float32((count / tensor.dims[0]) ** -0.5)
            else:
                values = np.full(count, tensor.name.endswith(".weight"), np.float32)
            handle.seek(int(place["offset"]))
            handle.write(values.astype(dtype).tobytes())


def _read_spec(path: Path) -> GraphSpec:
    from lsast_engines.bundle.graph_spec import TensorSpec

    data = json.loads(path.read_text())
    sides = (
        [TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in data[side]] for side in ("inputs", "outputs")
    )
    inputs, outputs = map(tuple, sides)
    return GraphSpec(DENOISER, inputs, outputs)


def random_feeds(spec: GraphSpec, cells: int) -> Feeds:
    """Inputs of batch 1 with guidance, for latents of `cells` squared."""
    lengths = {"B": 1, "G": 2, "h": cells, "w": cells, "H": 8 * cells, "W": 8 * cells}
    rng = np.random.default_rng(0)
    feeds = {}
    for tensor in spec.inputs:
        shape = [lengths[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
        values = np.full(shape, 500) if tensor.dtype == "int64" else rng.standard_normal(shape)
        feeds[tensor.name] = np.asarray(values, tensor.dtype)
    return feeds


def _error(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    return max(
        float(np.abs(found[name] - value).max() / max(1e-6, np.abs(value).max())) for name, value in expected.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "graphs", "painting", "sd15"))
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--plain", action="store_true", help="Without a CUDA graph.")
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args()
    device, tiny = ("cpu", True) if chosen.rehearse else ("cuda", False)
    if device == "cuda" and chosen.step != "prepare":
        import torch  # noqa: F401 - loads its CUDA and cuDNN, which the pruned wheel comes without

    if chosen.step == "prepare":
        prepare(chosen.bundle)
    elif chosen.step == "graphs":
        print(json.dumps(graphs(device, 8 if tiny else 64)))
    elif chosen.step == "painting":
        print(json.dumps(painting(device, 64 if tiny else 512)))
    else:
        print(json.dumps(sd15(device, 8 if tiny else 64, chosen.plain, 1 if tiny else 50)))


if __name__ == "__main__":
    main()
