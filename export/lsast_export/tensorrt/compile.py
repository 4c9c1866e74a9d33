"""Compiles graphs into engines with TensorRT or TensorRT-RTX.

Networks are strongly typed in both libraries: an engine computes in the types of the ONNX file, so the compute dtype is
set by rewriting the file (`graphs.gpu_graph`). TensorRT times its kernels on the GPU of this machine, and its engines
run on that GPU only; TensorRT-RTX compiles ahead of time, also without a GPU, for named compute capabilities, or
portably.
"""

import contextlib
import dataclasses
import hashlib
import re
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsast_engines.backends.base import ComputeDtype
from lsast_engines.backends.tensorrt.engine import load_library, make_logger
from lsast_engines.backends.tensorrt.engine_record import (
    ANY_GPU,
    PORTABLE,
    RTX_CAPABILITIES,
    SUFFIX,
    EngineKey,
    EngineRecord,
    ShapeRanges,
    TrtFlavor,
    engine_folder,
    graph_digest,
    verified_record,
)
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS, GraphSpec
from lsast_engines.bundle.manifest import QUANTIZED
from lsast_engines.environment import package_version
from lsast_engines.errors import BackendError, ExportError, UsageError, fault_list
from lsast_engines.files import replace_file
from lsast_engines.removed import removal

from ..graphs.gpu_graph import dtypes_in, write_gpu_graph
from ..progress import Progress, no_progress

BF16_CAPABILITY = 8.0
"""The first compute capability with bf16 (docs.nvidia.com/deeplearning/tensorrt, support matrix)."""


@dataclass(frozen=True)
class CompileOptions:
    """Options of a compilation.

    Raises:
        UsageError: an unknown compute dtype, or invalid targets.
    """

    library: TrtFlavor
    targets: tuple[str, ...] = ()
    """Compute capabilities for TensorRT-RTX, e.g. ``8.9``; empty means portable."""
    ranges: ShapeRanges = dataclasses.field(default_factory=ShapeRanges)
    compute_dtype: ComputeDtype = "fp16"
    """Data type to compute in, whatever the weights are stored in."""

    def __post_init__(self) -> None:
        if gone := removal(f"--compute-dtype {self.compute_dtype}"):
            raise UsageError(gone)
        if self.compute_dtype not in ("fp32", "fp16"):
            raise UsageError(f"found compute_dtype {self.compute_dtype}; engines are compiled in fp32 or fp16")
        wrong = [target for target in self.targets if not re.fullmatch(r"\d+\.\d", target)]
        if wrong:
            raise UsageError(f"found compute capability {', '.join(wrong)}; expected one such as 8.9")
        if self.targets and self.library == "tensorrt":
            raise UsageError(
                f"found compute capabilities {', '.join(self.targets)} for tensorrt; it compiles for the GPU that is "
                "here only: leave them out, or use tensorrt-rtx"
            )


def compile_graph(
    path: Path, spec: GraphSpec, engine: Path, options: CompileOptions, progress: Progress = no_progress
) -> EngineRecord:
    """Compile the graph file `path` into `engine`, with its record beside it.

    An engine that was compiled from the same graph with the same options is kept.

    Raises:
        MissingExtraError: the library is not installed.
        BackendError: TensorRT without a GPU.
        UsageError: a compute capability that the library does not know.
        ExportError: the graph cannot be compiled; with all messages of the library.
    """
    trt = load_library(options.library)
    targets, gpu = _targets(options, trt)
    key = EngineKey(
        graph=spec.name,
        onnx=graph_digest(path),
        profile=options.ranges.profile(spec),
        compute_dtype=options.compute_dtype,
        library=options.library,
        library_version=str(trt.__version__),
        targets=targets,
        gpu=gpu,
    )
    found: EngineRecord | None = None
    with contextlib.suppress(BackendError):
        found = verified_record(engine)
    phase = f"compiling {spec.name}"
    progress(phase)
    if found is not None and not key.differences(found.key):
        progress(phase, "up to date")
        return found
    if "BFLOAT16" in dtypes_in(path):  # before minutes are spent
        lacking = [target for target in targets if target != PORTABLE and float(target) < BF16_CAPABILITY]
        if lacking:
            raise ExportError(
                f"found bf16 weights in {path.name} for the compute capabilities {', '.join(lacking)}; expected at "
                f"least {BF16_CAPABILITY}: leave them out, or export with --storage-dtype fp16"
            )
    if found is not None:
        progress(phase, f"took {found.seconds:.0f} s last time")
    began = time.perf_counter()
    logger = make_logger(trt)
    with tempfile.TemporaryDirectory(prefix="lsast-compile.") as name:
        scratch = Path(name)
        for file in path.parent.iterdir():
            if file.suffix in (".data", ".safetensors"):
                # Links avoid copying gigabytes. onnx's own checks refuse them, the libraries' parser does not.
                (scratch / file.name).symlink_to(file.resolve())
        write_gpu_graph(path, scratch / path.name, spec.name, half=options.compute_dtype == "fp16", fused=False)
        serialized = _build(trt, logger, scratch / path.name, key, options, progress)
    seconds = time.perf_counter() - began
    with replace_file(engine, own=True) as handle:
        handle.write(serialized)
    record = EngineRecord(
        key=key,
        sha256=hashlib.sha256(serialized).hexdigest(),
        bytes=memoryview(serialized).nbytes,
        seconds=round(seconds, 3),
        activation_bytes=logger.activation_bytes,
        lsast_version=package_version("lsast"),
    )
    record.save(engine)
    return record


def compile_bundle(
    path: Path,
    options: CompileOptions,
    out: Path | None = None,
    progress: Progress = no_progress,
    graphs: Collection[str] = (),
) -> dict[str, EngineRecord]:
    """Compile the graphs of the bundle at `path`; see `compile_graph`.

    Args:
        out: folder of the engines; by default the one where `lsast-run` looks for them.
        graphs: names of graphs to compile; by default those that every bundle has.

    Raises:
        BundleError: no sound bundle.
        UsageError: there is no such graph, or the bundle is quantized.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    if manifest.storage_dtype in QUANTIZED:  # its Q/DQ pairs are placed for CPUs
        made_from = manifest.source.get("quantized_from", "see its manifest")
        raise UsageError(
            f"found {path} in {manifest.storage_dtype}, quantized for CPUs; expected the bundle that it was made "
            f"from, {made_from}: GPUs compute in fp16"
        )
    if unknown := sorted(set(graphs) - manifest.graphs.keys()):
        raise UsageError(f"found graphs {', '.join(unknown)}; expected of {', '.join(manifest.graphs)}")
    chosen = set(graphs) or set(REQUIRED_GRAPHS)
    folder = out or engine_folder(path, options.library, options.compute_dtype)
    return {
        name: compile_graph(bundle.graph_path(name), spec, folder / f"{name}{SUFFIX}", options, progress)
        for name, spec in manifest.graphs.items()
        if name in chosen
    }


def _build(
    trt: Any, logger: Any, source: Path, key: EngineKey, options: CompileOptions, progress: Progress
) -> memoryview:
    """The serialized engine of the graph `source`. Every object lives to the end, which the library needs."""

    def require(passed: Any, what: str, *faults: str) -> None:
        """Raise unless `passed` and no error was logged."""
        found = list(dict.fromkeys([*faults, *logger.take()]))
        if not passed or found:
            what = f"{key.library} {key.library_version}: graph {key.graph} {what}:"
            raise ExportError(fault_list(what, found or ["(no reason given)"]))

    began = time.perf_counter()

    class Monitor(trt.IProgressMonitor):
        """Reports the outer phases of a build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None or parent == "Building engine":
                told = f"{name[0].lower()}{name[1:]}, {time.perf_counter() - began:.0f} s"
                progress(f"compiling {key.graph}", told)

        def step_complete(self, name: str, step: int) -> bool:
            return True

        def phase_finish(self, name: str) -> None: ...

    builder = trt.Builder(logger)
    # TensorRT 10 would choose types by itself; later versions, and TensorRT-RTX, know no other networks.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(source))
    require(parsed, "cannot be read", *(str(parser.get_error(index).desc()) for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    require(inputs == key.profile.keys(), f"takes {', '.join(sorted(inputs))}; expected {', '.join(key.profile)}")
    for name, span in key.profile.items():
        profile.set_shape(name, *span)
    require(config.add_optimization_profile(profile) == 0, "does not take these sizes")
    monitor = Monitor()
    config.progress_monitor = monitor
    # It would round float32 to the 10 bits of TF32.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            done = config.set_compute_capability(_capability(trt, target), index)
            require(done, f"cannot be compiled for {target}")
    serialized = builder.build_serialized_network(network, config)
    require(serialized is not None, "cannot be compiled")
    return memoryview(serialized)


def _targets(options: CompileOptions, trt: Any) -> tuple[tuple[str, ...], str]:
    """The compute capabilities of the engine, and the name of the GPU if it is bound to one."""
    if options.library == "tensorrt-rtx":
        for target in options.targets:
            _capability(trt, target)
        return options.targets or (PORTABLE,), ANY_GPU
    from lsast_engines.backends.tensorrt.cuda import gpu_fault, gpus

    if fault := gpu_fault():
        raise BackendError(
            f"found no NVIDIA GPU ({fault}); tensorrt compiles on the GPU that runs the engine: use one, or "
            "tensorrt-rtx"
        )
    (first, *_) = gpus()
    return (first.capability,), first.name


def _capability(trt: Any, target: str) -> Any:
    members = trt.ComputeCapability.__members__
    known = {name: members[key] for name in RTX_CAPABILITIES if (key := f"SM{name.replace('.', '')}") in members}
    if target not in known:
        raise UsageError(
            f"found compute capability {target}; tensorrt-rtx {trt.__version__} compiles for {', '.join(known)}, the "
            "capabilities of the GPUs that it runs on: use onnxruntime or tensorrt for others"
        )
    return known[target]
