"""ONNX graphs in ONNX Runtime itself, on random inputs: what an engine or a rewritten graph is compared with."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from lsast_engines.bundle.graph_spec import GraphSpec

LENGTHS = {"B": 1, "G": 2, "H": 128, "W": 192, "h": 16, "w": 24, "h2": 8, "w2": 12, "h4": 4, "w4": 6, "h8": 2, "w8": 3}
"""Lengths of the axes of a bundle's graphs for a picture of 192 x 128 pixels."""

Feeds = dict[str, np.ndarray]


def random_feeds(spec: GraphSpec, lengths: Mapping[str, int] = LENGTHS, seed: int = 0) -> Feeds:
    """Inputs of a graph: timesteps, and normally distributed numbers."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for tensor in spec.inputs:
        shape = [lengths[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
        values = rng.integers(0, 1000, shape) if tensor.dtype == "int64" else rng.standard_normal(shape)
        feeds[tensor.name] = np.asarray(values, tensor.dtype)
    return feeds


def run_graph(graph: Path | bytes, feeds: Feeds, *, optimize: bool = True, threads: int = 1) -> Feeds:
    """The outputs of a graph on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, feeds), strict=True))
