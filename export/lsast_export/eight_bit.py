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
import re
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lsast_engines.bundle import Bundle
from lsast_engines.engine import open_engine
from lsast_engines.engine_key import graph_digest
from lsast_engines.errors import ExportError, MissingExtraError, UsageError
from lsast_engines.spec import DENOISER

from .calibration import ends
from .origin import tell_origin
from .plain_graph import plain_graph
from .progress import Progress, silent
from .smoothing import channel_reach, find_factors
from .smoothing import smooth as smooth_graph
from .trial import Feeds, Floats, Pixels, decode_all, feeds_at, make_trials, psnr, run_trial
from .triton import one_element

Kind = Literal["int8", "fp8"]


def quantise_denoiser(
    bundle: Bundle,
    contents: Sequence[Pixels],
    kind: Kind,
    out: Path,
    progress: Progress = silent,
    smooth: float | None = None,
) -> Path:
    """Write the denoiser of `bundle` with 8-bit products; first and last convolutions and the time path stay float.

    Args:
        bundle: an exported bundle with at least one style.
        contents: pictures to calibrate on, at least one, [side, side, 3] each, of a legal size.
        kind: ``int8``, or ``fp8`` for GPUs from compute capability 8.9 on.
        out: the file to write; its weights go to a file beside it.
        progress: told of phases.
        smooth: how much of what is hard to round moves from activations into weights first, from 0 to 1 (`smoothing`);
            None leaves them as they are.

    Returns:
        `out`.

    Raises:
        MissingExtraError: ModelOpt is not installed.
        UsageError: no pictures, or no style.
        ExportError: ModelOpt fails, or quantised nothing.
    """
    quantize = _modelopt()
    spec = bundle.manifest.graphs[DENOISER]
    progress("calibrating")
    steps = calibration_feeds(bundle, contents)
    progress(f"quantising to {kind}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lsast-quantise.") as folder:
        source, result = Path(folder, "denoiser.onnx"), Path(folder, "quantised.onnx")
        model = plain_graph(bundle.graph_path(DENOISER))
        if smooth is not None:
            progress("smoothing")
            model = _smoothed(model, steps, smooth, Path(folder))
        for tensor in spec.inputs:
            if not tensor.shape:
                one_element(model, tensor.name)
                steps = [{**feeds, tensor.name: feeds[tensor.name].reshape(1)} for feeds in steps]
        onnx.save(model, source, save_as_external_data=True)
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
                nodes_to_exclude=[f"{re.escape(name)}$" for name in sorted(ends(bundle.graph_path(DENOISER)))],
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
    tell_origin(model, graph_digest(bundle.graph_path(DENOISER)))
    onnx.save(model, out, save_as_external_data=True, location=f"{out.stem}.data")
    return out


def calibration_feeds(bundle: Bundle, contents: Sequence[Pixels]) -> list[Feeds]:
    """What the denoiser is fed at the first steps of paintings of `contents`, in the styles by turns.

    Their strengths are spread evenly, so that the pictures are noised to all stages. Whole runs, which `quantise` is
    calibrated on, would take hours of a processor for a base that needs a GPU.

    Raises:
        UsageError: no pictures, or no style.
    """
    styles = list(bundle.styles())
    if not contents or not styles:
        raise UsageError(
            f"found {len(contents)} pictures and {len(styles)} styles to calibrate on; expected some of both"
        )
    strengths = [(index + 0.5) / len(contents) for index in range(len(contents))]
    trials = make_trials(bundle, contents, styles, strengths, "onnxruntime")
    feeds = [feeds_at(bundle, trial, trial.schedule.steps[0], trial.noisy) for trial in trials]
    # A calibrator takes one shape: with guidance, unless no style has any left to apply.
    widest = max(len(each["kv_unet"]) for each in feeds)
    return [each for each in feeds if len(each["kv_unet"]) == widest]


def _smoothed(model: Any, steps: Sequence[Feeds], alpha: float, folder: Path) -> Any:
    """The plain graph `model` smoothed by what it does on `steps`; `folder` is for files."""
    path = folder / "plain.onnx"
    onnx.save(model, path, save_as_external_data=True)  # which empties `model`
    model = onnx.load(path)
    smooth_graph(model, find_factors(model, channel_reach(path, steps), alpha))
    return model


class Cost(NamedTuple):
    """What quantising costs: PSNR in dB against the float32 denoiser, of the same seeds; peak is the largest magnitude
    of the float32 side, for pictures their range."""

    noise: float
    """Of the predicted noise of single steps."""
    latent: float
    """Of the latent that a painting ends in."""
    picture: float
    """Of what that latent decodes to."""


def quality(bundle: Bundle, quantised: Path, contents: Sequence[Pixels]) -> Cost:
    """Compare a quantised denoiser with the bundle's own on the CPU: single steps, and whole paintings by defaults.

    Raises:
        BackendError: ONNX Runtime does not run the quantised graph.
    """
    spec = bundle.manifest.graphs[DENOISER]
    trials = make_trials(bundle, contents, list(bundle.styles()), [None], "onnxruntime", seed=1000)
    single = calibration_feeds(bundle, contents)

    def tried(graph: Path) -> tuple[Floats, Floats]:
        with closing(open_engine(graph, spec, "onnxruntime", "cpu")) as denoiser:
            noise = [denoiser(feeds)["eps"].copy() for feeds in single]
            return np.stack(noise), np.stack([run_trial(bundle, trial, denoiser) for trial in trials])

    exact, found = tried(bundle.graph_path(DENOISER)), tried(quantised)
    noise, latent = (psnr(f, e, float(np.abs(e).max())) for f, e in zip(found, exact, strict=True))

    def decoded(latents: Floats) -> Pixels:
        return np.stack(decode_all(bundle, bundle.path, list(latents), "onnxruntime"))

    return Cost(noise, latent, psnr(decoded(found[1]), decoded(exact[1])))


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
