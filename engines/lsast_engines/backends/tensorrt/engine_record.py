"""The record of a compiled engine: what it was compiled from, and for which shapes and GPUs, in a file beside it.

::

    denoiser.engine         written by the library, opaque
    denoiser.engine.json    `EngineRecord`: the key, SHA-256 and size of the engine, the time it took to compile

A library does not say whether an engine is the right one: it crashes, refuses it with a number, or computes something
else. So every field that matters is recorded, and compared before the library reads the engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from ...bundle.graph_spec import (
    CONTROLNET_COND,
    VAE_DECODER,
    VAE_DECODER_TINY,
    VAE_ENCODER,
    GraphSpec,
    downsampling_level,
)
from ...bundle.json_fields import parse_json, read_object
from ...bundle.manifest import MANIFEST, Manifest, declared_hashes
from ...declared_options import Range as Limits
from ...errors import BackendError, BundleError, UsageError, fault_list
from ...files import MAKE_OWN, cache_home, file_sha256, replace_file, written_by_others
from ..base import FACTOR, Shape

FORMAT = 4
"""Format number of records; raised also when compiling makes another graph from the same file."""

TrtFlavor = Literal["tensorrt", "tensorrt-rtx"]
"""The libraries that compile engines."""

SUFFIX = ".engine"
"""Suffix of an engine file; the name before it is the graph's."""

RTX_CAPABILITIES = ("7.5", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities of the GPUs that TensorRT-RTX supports: those of GeForce and RTX from Turing on, not those of
data centres such as 8.0, 9.0 and 10.0 (docs.nvidia.com/deeplearning/tensorrt-rtx, support matrix)."""

PORTABLE = "portable"
"""Target of an engine that runs on every GPU of `RTX_CAPABILITIES` from 8.6 on."""
ANY_GPU = "any"
"""`EngineKey.gpu` of an engine that is bound to a compute capability only."""


class Range(NamedTuple):
    """Minimum, optimum and maximum length of an axis, for which TensorRT compiles an engine and tunes it."""

    min: int
    opt: int
    max: int


class InputShapes(NamedTuple):
    """Minimum, optimum and maximum shape of an input, in TensorRT's order."""

    min: Shape
    opt: Shape
    max: Shape


_SIDE, _BATCH, _GUIDANCE = Range(384, 512, 1024), Range(1, 1, 4), Range(1, 2, 2)

_ONE_BY_ONE = (VAE_ENCODER, CONTROLNET_COND, VAE_DECODER, VAE_DECODER_TINY)
"""Graphs that run on one picture at a time: at four of 1024² a decoder would need several times the memory."""

Profile = dict[str, InputShapes]
"""The shapes that an engine was compiled for, by input."""


@dataclass(frozen=True)
class ShapeRanges:
    """The sizes that a user wants to run a compiled engine with. A `UsageError` lists all ranges that are not
    ordered, or out of bounds."""

    side: Range = _SIDE
    """Height and width in pixels, multiples of 8."""
    batch: Range = _BATCH
    """Pictures at once, in the graphs of the denoising loop."""
    guidance: Range = _GUIDANCE
    """Passes for guidance: 1 without, 2 with."""

    def __post_init__(self) -> None:
        faults = [
            f"{name}: found {', '.join(map(str, axis))}; expected minimum, optimum and maximum, each at least 1"
            for name, axis in (("side", self.side), ("batch", self.batch), ("guidance", self.guidance))
            if not 1 <= axis.min <= axis.opt <= axis.max
        ]
        if any(side % FACTOR for side in self.side):
            faults.append(f"side: found {', '.join(map(str, self.side))}; expected multiples of {FACTOR} pixels")
        if self.guidance.max > 2:
            faults.append(f"guidance: found {self.guidance.max} passes; expected 1 or 2")
        if faults:
            raise UsageError(fault_list("invalid shape ranges of an engine:", faults))

    def profile(self, spec: GraphSpec) -> Profile:
        """The shapes that every input of `spec` may have."""
        batch = Range(1, 1, 1) if spec.name in _ONE_BY_ONE else self.batch
        axes = {"B": batch, "G": self.guidance, "H": self.side, "W": self.side}
        cells = {axis for tensor in spec.inputs for axis in tensor.shape if isinstance(axis, str) and axis[0] in "hw"}
        axes |= {axis: Range(*(side // FACTOR >> downsampling_level(axis) for side in self.side)) for axis in cells}
        profile = {}
        for tensor in spec.inputs:
            lengths = [(axis,) * 3 if isinstance(axis, int) else axes[axis] for axis in tensor.shape]
            profile[tensor.name] = InputShapes(*(tuple(length[place] for length in lengths) for place in range(3)))
        return profile


def check_profile(profile: Profile, shapes: Mapping[str, Shape], graph: str) -> None:
    """Check the shapes of inputs of `graph`; a `BackendError` lists all that its engine was not compiled for,
    and says how to compile one that accepts them."""
    faults = []
    for name, shape in shapes.items():
        allowed = profile[name]
        if not all(low <= found <= high for low, found, high in zip(allowed.min, shape, allowed.max, strict=True)):
            faults.append(f"{name}: found {list(shape)}; expected {list(allowed.min)} to {list(allowed.max)}")
    if faults:
        heading = f"the engine of graph {graph} was not compiled for this; compile it with a wider --sides or --batch:"
        raise BackendError(fault_list(heading, faults))


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """Everything that an engine depends on; equal keys mean interchangeable engines."""

    graph: str
    """Name of the graph, e.g. ``denoiser``."""
    onnx: str
    """`graph_digest` of the bundle's file: graph and weights."""
    profile: Profile
    """Input shapes that it accepts."""
    compute_dtype: str
    """``fp32`` or ``fp16``."""
    library: TrtFlavor
    library_version: str
    targets: tuple[str, ...]
    """Compute capabilities, e.g. ``8.9``, or `PORTABLE`."""
    gpu: str = ANY_GPU
    """Name of the GPU. TensorRT chooses kernels by timing them on one GPU, and its engine runs on no other."""

    def differences(self, found: EngineKey) -> list[str]:
        """One line for each field in which `found` differs from this key."""
        return [
            f"{field.name}: found {_short(getattr(found, field.name))}; expected {_short(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(found, field.name) != getattr(self, field.name)
        ]

    def unsupported_reasons(self, capability: str, gpu: str) -> list[str]:
        """Why the engine does not run on a GPU of this compute capability and name; empty if it does."""
        faults = []
        if capability not in self.targets and (PORTABLE not in self.targets or capability not in RTX_CAPABILITIES[1:]):
            faults.append(f"targets: found {', '.join(self.targets)}; expected {capability}, the GPU's")
        if self.gpu not in (ANY_GPU, gpu):
            faults.append(f"gpu: found {self.gpu}; expected {gpu}")
        return faults


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """The record of one engine file."""

    key: EngineKey
    sha256: str
    bytes: Annotated[int, Limits(0, 1 << 50)]
    seconds: float
    """Time that it took to compile."""
    activation_bytes: Annotated[int, Limits(0, 1 << 50)]
    """Largest working memory of a run, at the largest input shapes, beside weights, inputs and outputs."""
    lsast_version: str

    def save(self, engine: Path) -> None:
        """Write the record beside `engine`."""
        with replace_file(record_path(engine), own=True) as handle:
            handle.write((json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode())


def record_path(engine: Path) -> Path:
    """The file of the record of `engine`."""
    return engine.with_name(f"{engine.name}.json")


def verified_record(engine: Path) -> EngineRecord:
    """The record beside `engine`, after a check of the engine's size and SHA-256; a `BackendError` for no engine, no
    record, one of another format, or a file that was truncated, changed or replaced."""
    if not engine.is_file():
        raise BackendError(f"found no engine {engine}; compile it")
    path = record_path(engine)
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BackendError(f"{path} cannot be read ({error}); compile the engine again") from error
    found = data.pop("format", None) if isinstance(data, dict) else None
    if found != FORMAT:
        raise BackendError(f"{path} has format {found!r}; this version reads {FORMAT}: compile the engine again")
    faults: list[str] = []
    record = read_object(EngineRecord, data, "", faults)
    if record is None:
        raise BackendError(fault_list(f"{path} is not the record of an engine; compile it again:", faults))
    if (size := engine.stat().st_size) != record.bytes:
        faults.append(f"bytes: found {size}; expected {record.bytes}")
    elif (digest := file_sha256(engine)) != record.sha256:
        faults.append(f"SHA-256: found {digest[:12]}…; expected {record.sha256[:12]}…")
    if faults:
        raise BackendError(fault_list(f"{engine} is not what was compiled; compile it again:", faults))
    return record


def graph_digest(path: Path) -> str:
    """SHA-256 (hex) of a graph file and of the weight files beside it that it may refer to. The hashes of weights
    are taken from the manifest, if there is one."""
    weights = sorted(file for pattern in ("*.data", "base.safetensors") for file in path.parent.glob(pattern))
    declared = declared_hashes(path.parent)
    digest = hashlib.sha256(file_sha256(path).encode())
    for file in weights:
        digest.update(f" {file.name} {declared.get(file.name) or file_sha256(file)}".encode())
    return digest.hexdigest()


def engine_folder(bundle: Path, flavor: TrtFlavor, compute_dtype: str) -> Path:
    """The folder of the engines of a bundle: ``compiled/BASE/LIBRARY/DTYPE`` in the cache folder; a `BackendError` for
    no bundle, and where others may write the folder.

    It is named by the base's fingerprint: a bundle that is exported again finds its old engines there, and their
    records say in what they differ.
    """
    try:
        manifest = Manifest.from_json((bundle / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, BundleError) as error:
        raise BackendError(
            f"{bundle} is not a bundle ({error}); engines are compiled from a bundle's graphs"
        ) from error
    folder = cache_home() / "compiled" / f"{manifest.name}-{manifest.fingerprint[:16]}" / flavor / compute_dtype
    if others := written_by_others(folder, cache_home()):
        raise BackendError(f"found {others}, which others may write; expected engines of your own: {MAKE_OWN}")
    return folder


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value if len(value) < 64 else f"{value[:12]}…"
    if isinstance(value, dict):
        return "; ".join(f"{name} {' '.join(map(str, map(list, shapes)))}" for name, shapes in value.items())
    return ", ".join(value)
