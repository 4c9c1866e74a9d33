"""The denoiser with products of 8 bits for NVIDIA GPUs, through NVIDIA's ModelOpt: int8 or fp8, calibrated on pictures.

For processors there is `quantise`.

ModelOpt's quantisation of ONNX files inserts pairs of QuantizeLinear and DequantizeLinear, whose scales it takes from a
run of the graph on the CPU. Compilers make 8-bit products of them (`tensorrt`); what is not quantised stays float32.
ModelOpt fails on scalars, so that it is shown ``control_scale`` as a tensor of one element, and weights in halves with
a cast behind, so that it is shown them in float32. It pins versions of onnx and ONNX Runtime and goes into an
environment of its own: ``pip install 'lsast[modelopt]'``.
"""

from __future__ import annotations

import importlib
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lsast_engines.bundle import Bundle
from lsast_engines.engine import open_engine
from lsast_engines.errors import ExportError, MissingExtraError, UsageError
from lsast_engines.pictures import edge_map, read_picture
from lsast_engines.schedule import Schedule
from lsast_engines.solvers import make_solver
from lsast_engines.spec import DECODER, DENOISER, ENCODER, HINT, GraphSpec

from .progress import Progress, silent
from .triton import one_element

Kind = Literal["int8", "fp8"]
Feeds = dict[str, np.ndarray]


def quantise_denoiser(
    bundle: Bundle, pictures: Sequence[Path], kind: Kind, out: Path, side: int = 512, progress: Progress = silent
) -> Path:
    """Write the denoiser of `bundle` with 8-bit products.

    Args:
        bundle: an exported bundle with at least one style.
        pictures: photographs to calibrate on, at least one; each is noised to another timestep.
        kind: ``int8``, or ``fp8`` for GPUs from compute capability 8.9 on.
        out: the file to write; its weights go to a file beside it.
        side: pixels that the pictures are cut to, square.
        progress: told of phases.

    Returns:
        `out`.

    Raises:
        MissingExtraError: ModelOpt is not installed.
        UsageError: no pictures.
        ExportError: ModelOpt fails, or quantised nothing.
    """
    if not pictures:
        raise UsageError("found no pictures to calibrate on; expected at least one photograph")
    quantize = _modelopt()
    spec = bundle.manifest.graphs[DENOISER]
    progress("calibrating")
    steps = list(calibration_feeds(bundle, pictures, side))
    progress(f"quantising to {kind}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lsast-quantise.") as folder:
        source, result = Path(folder, "denoiser.onnx"), Path(folder, "quantised.onnx")
        onnx.save(_plain_graph(bundle.graph_path(DENOISER), spec), source, save_as_external_data=True)
        shapes = ",".join(f"{name}:{'x'.join(map(str, value.shape))}" for name, value in steps[0].items())
        try:
            quantize(
                str(source),
                quantize_mode=kind,
                calibration_data=gathered(steps),
                calibration_method="max",
                calibration_eps=["cpu"],
                calibration_shapes=shapes,
                output_path=str(result),
                high_precision_dtype="fp32",
                use_external_data_format=True,
                log_level="ERROR",
            )
        # A library of many layers, which raises what its layers raise.
        except Exception as error:
            raise ExportError(f"ModelOpt cannot quantise the denoiser to {kind}: {error}") from error
        model = onnx.load(result)
    held = sum(1 for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear"))
    if not held:
        raise ExportError(f"ModelOpt quantised nothing of the denoiser to {kind}")
    for tensor in spec.inputs:
        if not tensor.shape:
            take_scalar(model, tensor.name)
    progress(f"quantising to {kind}", f"{held} quantisers and dequantisers")
    onnx.save(model, out, save_as_external_data=True, location=f"{out.stem}.data")
    return out


def calibration_feeds(bundle: Bundle, pictures: Sequence[Path], side: int) -> Iterator[Feeds]:
    """What the denoiser is fed on its way to paintings of `pictures`, one step of each, in the styles by turns."""
    manifest = bundle.manifest
    styles = [bundle.style(name) for name in bundle.styles()]
    null = bundle.null_style
    rng = np.random.default_rng(0)
    abars = manifest.noise.alphas_cumprod()
    paths = {name: (bundle.graph_path(name), manifest.graphs[name]) for name in (ENCODER, HINT)}
    with (
        closing(open_engine(*paths[ENCODER], "onnxruntime")) as encoder,
        closing(open_engine(*paths[HINT], "onnxruntime")) as hint,
    ):
        for index, path in enumerate(pictures):
            rgb = _square(read_picture(path).rgb, side)
            image = rgb.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(127.5) - np.float32(1)
            z0 = encoder({"image": np.ascontiguousarray(image)})["mean"] * np.float32(manifest.latent_scale)
            edges = np.repeat(edge_map(rgb)[None, None].astype(np.float32), 3, axis=1)
            # Evenly over the schedule, whatever the number of pictures.
            t = int((index + 0.5) / len(pictures) * manifest.noise.train_steps)
            noise = rng.standard_normal(z0.shape, dtype=np.float32)
            stage = t * manifest.stages // manifest.noise.train_steps
            row, plain = styles[index % len(styles)].row(stage), null.row(stage if null.stages > 1 else 0)
            yield {
                "latent": np.float32(abars[t] ** 0.5) * z0 + np.float32((1 - abars[t]) ** 0.5) * noise,
                "hint": hint({"edges": edges})["hint"].copy(),
                "timestep": np.array([t], np.int64),
                "kv_unet": np.stack([plain.kv_unet, row.kv_unet])[:, None],
                "kv_control": row.kv_control[None],
                "control_scale": np.ones(1, np.float32),
            }


class Cost(NamedTuple):
    """What quantising costs: PSNR in dB against the float32 denoiser, of the same seeds; peak is the largest magnitude
    of the float32 side, for pictures their range."""

    noise: float
    """Of the predicted noise of single steps."""
    latent: float
    """Of the latent that a step of a whole run ends in."""
    picture: float
    """Of what that latent decodes to."""


def quality(bundle: Bundle, quantised: Path, pictures: Sequence[Path], side: int = 256, steps: int = 8) -> Cost:
    """Compare a quantised denoiser with the bundle's own on the CPU: single steps, and whole runs of DDIM.

    Raises:
        BackendError: ONNX Runtime does not run the quantised graph.
    """
    manifest = bundle.manifest
    spec = manifest.graphs[DENOISER]
    schedule = Schedule.build(manifest.noise, steps, 1.0, manifest.stages, "ddim")
    found: dict[str, list[np.ndarray]] = {"noise": [], "latent": [], "picture": []}
    exact: dict[str, list[np.ndarray]] = {"noise": [], "latent": [], "picture": []}
    with closing(open_engine(bundle.graph_path(DECODER), manifest.graphs[DECODER], "onnxruntime")) as decoder:
        for path, side_of in ((quantised, found), (bundle.graph_path(DENOISER), exact)):
            with closing(open_engine(path, spec, "onnxruntime")) as denoiser:
                for feeds in calibration_feeds(bundle, pictures, side):
                    feeds["control_scale"] = feeds["control_scale"].reshape(())
                    side_of["noise"].append(denoiser(feeds)["eps"].copy())
                    solver = make_solver("ddim", manifest.noise, schedule)
                    latent = np.random.default_rng(0).standard_normal(feeds["latent"].shape, dtype=np.float32)
                    for step in schedule.steps:
                        now = {**feeds, "latent": latent, "timestep": np.array([step.t], np.int64)}
                        eps = denoiser(now)["eps"]
                        latent = solver.step(eps[0] + np.float32(3) * (eps[1] - eps[0]), step.index, latent)
                    side_of["latent"].append(latent)
                    image = decoder({"latent": latent / np.float32(manifest.latent_scale)})["image"]
                    side_of["picture"].append(np.clip(image, -1, 1))
    peaks = {name: float(np.abs(values).max()) for name, values in exact.items()} | {"picture": 2.0}
    return Cost(**{name: psnr(found[name], exact[name], peak) for name, peak in peaks.items()})


def psnr(found: Sequence[np.ndarray], exact: Sequence[np.ndarray], peak: float) -> float:
    """10 log10(peak² / mean squared difference), in dB; infinite for equal arrays."""
    error = float(np.mean((np.asarray(found, np.float64) - np.asarray(exact, np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted.

    Raises:
        UsageError: there are none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not found:
        raise UsageError(f"found no pictures in {folder}; expected photographs (jpg, png, webp)")
    return found


def gathered(feeds: Sequence[Feeds]) -> Feeds:
    """Feeds end to end along their first axis, which ModelOpt's reader takes apart again in equal pieces."""
    return {name: np.concatenate([each[name] for each in feeds]) for name in feeds[0]}


def take_scalar(model: onnx.ModelProto, name: str) -> None:
    """Turn the input `name` of shape [1] of a graph into a scalar: the inverse of `triton.one_element`."""
    graph = model.graph
    element = f"{name}/element"
    for node in graph.node:
        for index, value in enumerate(node.input):
            if value == name:
                node.input[index] = element
    border = next(value for value in graph.input if value.name == name)
    border.CopyFrom(helper.make_tensor_value_info(name, border.type.tensor_type.elem_type, []))
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), f"{name}/axis"))
    nodes = [helper.make_node("Unsqueeze", [name, f"{name}/axis"], [element], element), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _plain_graph(path: Path, spec: GraphSpec) -> onnx.ModelProto:
    """The graph with weights in float32 instead of casts behind halves, and scalars of one element."""
    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    rest = []
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in weights and node.attribute[0].i == TensorProto.FLOAT:
            values = numpy_helper.to_array(weights[node.input[0]]).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        else:
            rest.append(node)
    used = {value for node in rest for value in node.input}
    held = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(rest)
    graph.initializer.extend(held)
    for tensor in spec.inputs:
        if not tensor.shape:
            one_element(model, tensor.name)
    return model


def _square(rgb: np.ndarray, side: int) -> np.ndarray:
    """The middle of a picture, [side, side, 3]."""
    import cv2

    height, width = rgb.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    middle = rgb[top : top + edge, left : left + edge]
    return np.asarray(cv2.resize(middle, (side, side), interpolation=cv2.INTER_AREA))


def _modelopt() -> Any:
    """ModelOpt's `quantize` for ONNX files.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        module = importlib.import_module("modelopt.onnx.quantization")
    except ImportError as error:
        raise MissingExtraError("nvidia-modelopt", "modelopt") from error
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    return module.quantize
