"""Milliseconds of a denoising step on one device, one way beside the other in one run.

    python -m benchmarks.speed.gpu_latency [--bundle mini] [--size 512] [--batch 1] [--repeats 50]

Ways: torch eager and `torch.compile` in the compute dtype asked for, ONNX Runtime on the device, and the compiled
engines of TensorRT and TensorRT-RTX. A way that this machine has not says why. Each step runs the ControlNet and, with
guidance, the U-Net of two rows. Prints a Markdown table of medians and spreads (largest less smallest of five groups);
run nothing else meanwhile.

Never run on a GPU yet: `--device cpu` runs those ways that a machine without one has.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import click
import numpy as np

from benchmarks.bench.machine import describe
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import Bundle, find_bundle
from lsast_engines.bundle.graph_spec import DENOISER
from lsast_engines.errors import LsastError

GROUPS = 5
Step = Callable[[], None]
"""Runs one step and returns when the device is done with it."""


class Case:
    """A bundle, and random inputs of its denoiser."""

    def __init__(self, bundle: Bundle, size: int, batch: int, device: str, compute_dtype: str) -> None:
        self.bundle, self.device, self.compute_dtype, self.batch = bundle, device, compute_dtype, batch
        self.spec, self.path = bundle.manifest.graphs[DENOISER], bundle.graph_path(DENOISER)
        lengths = {"B": batch, "G": 2, "h": size // 8, "w": size // 8}
        rng = np.random.default_rng(0)
        self.feeds: dict[str, np.ndarray] = {}
        for tensor in self.spec.inputs:
            shape = [lengths[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
            values = rng.integers(0, 1000, shape) if tensor.dtype == "int64" else rng.standard_normal(shape)
            self.feeds[tensor.name] = np.asarray(values, tensor.dtype)


def torch_step(case: Case, compiled: bool) -> Iterator[Step]:
    import torch

    from lsast_export.graphs.modules import graph_module
    from lsast_train.base.lazy_base import load_base

    if case.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU")
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[case.compute_dtype]
    feeds = [torch.from_numpy(value).to(case.device) for value in case.feeds.values()]
    module = graph_module(load_base(case.bundle.path), DENOISER)
    with torch.inference_mode():
        module = module.to(case.device)
        run: Any = torch.compile(module) if compiled else module

        def step() -> None:
            with torch.autocast(case.device, kind, enabled=kind != torch.float32):
                run(*feeds)
            if case.device == "cuda":
                torch.cuda.synchronize()

        yield step


def engine_step(case: Case, backend: str) -> Iterator[Step]:
    library = backend.startswith("tensorrt")
    device = case.device if not library else "auto"
    compute_dtype: Any = case.compute_dtype if library else "fp32"
    with closing(open_engine(case.path, case.spec, backend, device, compute_dtype=compute_dtype)) as engine:
        step_feeds = {name: case.feeds[name] for name in ("latent", "timestep")}
        engine.bind_inputs({name: value for name, value in case.feeds.items() if name not in step_feeds})
        yield lambda: engine(step_feeds) and None


WAYS: dict[str, Callable[[Case], Iterator[Step]]] = {
    "torch eager": lambda case: torch_step(case, False),
    "torch.compile": lambda case: torch_step(case, True),
    "onnxruntime": lambda case: engine_step(case, "onnxruntime"),
    "tensorrt-rtx": lambda case: engine_step(case, "tensorrt-rtx"),
    "tensorrt": lambda case: engine_step(case, "tensorrt"),
}


def measured(step: Step, repeats: int) -> list[float]:
    """Milliseconds a step of each of `GROUPS` groups, after as many calls to warm up as a CUDA graph needs."""
    for _ in range(3):
        step()
    groups = []
    for _ in range(GROUPS):
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        groups.append(1e3 * (time.perf_counter() - begin) / repeats)
    return groups


@click.command()
@click.option("--bundle", help="Folder or name. [default: the embedded one]")
@click.option("--size", default=512, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--compute-dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True,
              help="Of torch and the compiled engines; ONNX Runtime computes in fp32.")  # fmt: skip
@click.option("--repeats", default=50, show_default=True, help="Calls in each of five groups.")
@click.option("--json", "as_json", is_flag=True)
def main(
    bundle: str | None, size: int, batch: int, device: str, compute_dtype: str, repeats: int, as_json: bool
) -> None:
    """Measure one way after another."""
    case = Case(Bundle.open(find_bundle(bundle)), size, batch, device, compute_dtype)
    rows: list[dict[str, Any]] = []
    for way, make in WAYS.items():
        row: dict[str, Any] = {"way": way, "ms_per_step": None, "spread": None, "missing": ""}
        try:
            with ExitStack() as stack:
                step = stack.enter_context(contextmanager(make)(case))
                groups = measured(step, repeats)
            row |= {"ms_per_step": statistics.median(groups), "spread": max(groups) - min(groups)}
        except (LsastError, ImportError, RuntimeError) as error:
            row["missing"] = str(error).splitlines()[0]
        rows.append(row)
    facts = {
        **describe(("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")),
        "gpu": _gpu(),
        "case": f"{size}x{size}, batch {batch}, guided, {compute_dtype} on {device}, {repeats} calls x {GROUPS}",
    }
    if as_json:
        click.echo(json.dumps({"machine": facts, "rows": rows}, indent=1))
        return
    click.echo(f"{facts}\n\n| way | ms a step | spread |\n|---|---|---|")
    for row in rows:
        figures = row["missing"] if row["ms_per_step"] is None else f"{row['ms_per_step']:.2f} | {row['spread']:.2f}"
        click.echo(f"| {row['way']} | {figures} |" + (" |" if row["ms_per_step"] is None else ""))


def _gpu() -> str:
    from lsast_engines.backends.tensorrt.cuda import gpus

    try:
        return ", ".join(gpu.name for gpu in gpus()) or "none"
    except LsastError as error:
        return str(error)


if __name__ == "__main__":
    main()
