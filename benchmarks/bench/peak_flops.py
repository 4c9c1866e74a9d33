"""How fast this machine multiplies matrices: what every other figure of the bench is a fraction of.

One large product, by NumPy's BLAS and as a graph of one MatMul through every installed backend, in every compute dtype
that it has; the best of each counts. A convolution that a backend computes by Winograd's method needs fewer
multiplications than are counted, so that a fraction may come out above what this allows.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from lsast_engines.backends.base import ComputeDtype
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.graph_spec import GraphSpec, TensorSpec
from lsast_engines.errors import BackendError

SIDE = 2048
"""Rows and columns of the matrices: 8.6 G multiplications, with 50 MB of operands and result."""
REPEATS = 8
"""Times that a product is taken; the quickest counts, for nothing can be quicker than the machine."""

INT8 = "int8"
"""The compute dtype of a graph whose product is quantized, besides those of `ComputeDtype`."""


def peak_flops(
    backends: Sequence[str], threads: int | None = None, side: int = SIDE, repeats: int = REPEATS
) -> dict[str, dict[str, float]]:
    """Measure.

    Args:
        backends: names of those that are installed and run on the CPU.
        threads: threads for the backends; None is their choice. What BLAS takes is settled before NumPy is imported.
        side: rows and columns of the matrices.
        repeats: times that each product is taken.

    Returns:
        By compute dtype (`fp32`, …, ``int8``) and by who computed it (``numpy`` or a backend), multiply-accumulates a
        second in units of 10⁹; a compute dtype that a backend lacks is left out.
    """
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((side, side), dtype=np.float32) for _ in range(2))
    found: dict[str, dict[str, float]] = {"fp32": {"numpy": _rate(lambda: np.matmul(left, right), side, repeats)}}
    with tempfile.TemporaryDirectory(prefix="lsast-bench-") as folder:
        plain, quantized = Path(folder) / "matmul.onnx", Path(folder) / "matmul8.onnx"
        plain.write_bytes(matmul_graph(right))
        quantized.write_bytes(quantized_matmul_graph(right))
        for backend in backends:
            for compute_dtype in get_args(ComputeDtype):
                with contextlib.suppress(BackendError):
                    rate = _engine_rate(plain, backend, compute_dtype, threads, left, repeats)
                    found.setdefault(compute_dtype, {})[backend] = rate
            with contextlib.suppress(BackendError):
                rate = _engine_rate(quantized, backend, "fp32", threads, left, repeats)
                found.setdefault(INT8, {})[backend] = rate
    return found


def spec(side: int) -> GraphSpec:
    """Input and output of both graphs: x [side, side] → y = x · w."""
    return GraphSpec("matmul", (TensorSpec("x", "float32", (side, side)),), (TensorSpec("y", "float32", (side, side)),))


def matmul_graph(right: npt.NDArray[np.float32]) -> bytes:
    """An ONNX file of y = x · `right` [n, n]; the factor is a constant, which backends pack beforehand as weights."""
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": right}, len(right))


def quantized_matmul_graph(right: npt.NDArray[np.float32]) -> bytes:
    """The same with both factors in 8 bits (x unsigned in steps of 1/16 about 128, `right` signed to its extremes)."""
    step = np.float32(np.abs(right).max() / 127)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_step", "x_zero"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "x_step", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w8", "w_step", "w_zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    constants: dict[str, npt.NDArray[Any]] = {
        "x_step": np.array(1 / 16, np.float32),
        "x_zero": np.array(128, np.uint8),
        "w8": np.round(right / step).astype(np.int8),
        "w_step": np.array(step),
        "w_zero": np.array(0, np.int8),
    }
    return _model(nodes, constants, len(right))


def _model(nodes: list[Any], constants: dict[str, npt.NDArray[Any]], side: int) -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in ("x", "y"))
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "matmul", [x], [y], weights)
    serialized: bytes = helper.make_model(
        graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)]
    ).SerializeToString()
    return serialized


def _engine_rate(
    path: Path,
    backend: str,
    compute_dtype: ComputeDtype,
    threads: int | None,
    left: npt.NDArray[np.float32],
    repeats: int,
) -> float:
    with contextlib.closing(open_engine(path, spec(len(left)), backend, "cpu", threads, compute_dtype)) as engine:
        return _rate(lambda: engine({"x": left}), len(left), repeats)


def _rate(multiply: Callable[[], Any], side: int, repeats: int) -> float:
    """10⁹ multiply-accumulates a second, at the quickest of `repeats` after one that warms up."""
    multiply()
    quickest = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        multiply()
        quickest = min(quickest, time.perf_counter() - begin)
    return side**3 / quickest / 1e9
