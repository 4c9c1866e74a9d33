"""What a compiled engine was compiled from, and for: its key, in a file beside it.

::

    denoiser.engine         what the library wrote, opaque
    denoiser.engine.json    `EngineRecord`: the key, SHA-256 and size of the engine, how long it took to compile

A library gives no usable answer to "is this engine the right one?": it crashes, refuses with a number, or computes
something else. So every field that matters is written down and compared before the library sees a byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ...bundle.manifest import Manifest
from ...errors import BackendError, BundleError, fault_list
from ...files import cache_home, file_sha256, replace_file
from .shape_profile import Profile, profile_from_json, profile_to_json

FORMAT = 2
"""Raised when records are written otherwise, or when compiling makes another graph of the same file."""

Library = Literal["tensorrt", "tensorrt-rtx"]
"""The libraries that compile engines."""

SUFFIX = ".engine"
"""Of the file names of engines; what comes before is the graph."""

PORTABLE = "portable"
"""Target of an engine that runs on every GPU from compute capability 8.0 on that TensorRT-RTX supports."""
ANY_GPU = "any"
"""`EngineKey.gpu` of an engine that is bound to a compute capability only."""


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """Everything that an engine depends on."""

    graph: str
    """Name of the graph, e.g. ``denoiser``."""
    onnx: str
    """`graph_digest` of the bundle's file: graph and weights."""
    profile: Profile
    """Shapes that it takes."""
    compute_dtype: str
    """What it computes in: ``fp32`` or ``fp16``."""
    library: Library
    library_version: str
    targets: tuple[str, ...]
    """Compute capabilities, e.g. ``8.9``, or `PORTABLE`."""
    gpu: str = ANY_GPU
    """Name of the GPU; TensorRT times its kernels on one, so that its engine serves no other."""

    def differences(self, found: EngineKey) -> list[str]:
        """One line for each field in which the engine `found` is not this one."""
        return [
            f"{field.name}: found {_short(getattr(found, field.name))}; expected {_short(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(found, field.name) != getattr(self, field.name)
        ]

    def serves(self, capability: str, gpu: str) -> list[str]:
        """Why this engine does not run on a GPU of this compute capability and name; nothing if it does."""
        faults = []
        portable = PORTABLE in self.targets and _number(capability) >= (8, 0)
        if not portable and capability not in self.targets:
            faults.append(f"targets: found {', '.join(self.targets)}; expected {capability}, that of the GPU")
        if self.gpu not in (ANY_GPU, gpu):
            faults.append(f"gpu: found {self.gpu}; expected {gpu}")
        return faults


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What is written beside an engine."""

    key: EngineKey
    sha256: str
    bytes: int
    seconds: float
    """How long it took to compile, on the machine that did."""
    lsast_version: str

    def save(self, engine: Path) -> None:
        """Write it beside `engine`."""
        data = asdict(self)
        data["key"]["profile"] = profile_to_json(self.key.profile)
        with replace_file(record_path(engine)) as handle:
            handle.write((json.dumps({"format": FORMAT, **data}, indent=1) + "\n").encode())

    @classmethod
    def load(cls, engine: Path) -> EngineRecord:
        """Read what lies beside `engine`.

        Raises:
            BackendError: not there, not a record, or of another format.
        """
        path = record_path(engine)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BackendError(f"{path} cannot be read ({error}); compile the engine again") from error
        found = data.pop("format", None) if isinstance(data, dict) else None
        if found != FORMAT:
            raise BackendError(f"{path} has format {found!r}; this version reads {FORMAT}: compile the engine again")
        try:
            return _record(data)
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(f"{path} is not the record of an engine ({error}); compile the engine again") from error


def _record(data: dict[str, Any]) -> EngineRecord:
    key = data.pop("key")
    if key["library"] not in get_args(Library):
        raise ValueError(f"library: found {key['library']!r}; expected one of {', '.join(get_args(Library))}")
    key["profile"] = profile_from_json(key["profile"])
    key["targets"] = tuple(key["targets"])
    record = EngineRecord(key=EngineKey(**key), **data)
    wrong = [
        name
        for owner, names in (
            (record, ("sha256", "lsast_version")),
            (record.key, ("graph", "onnx", "compute_dtype", "gpu")),
        )
        for name in names
        if not isinstance(getattr(owner, name), str)
    ]
    if wrong or not isinstance(record.bytes, int) or not isinstance(record.seconds, (int, float)):
        raise ValueError(f"wrong types, {', '.join(wrong) or 'bytes or seconds'}")
    return record


def record_path(engine: Path) -> Path:
    """Where the record of `engine` lies."""
    return engine.with_name(f"{engine.name}.json")


def verified_record(engine: Path) -> EngineRecord:
    """The record of `engine`, whose bytes are what was written.

    Raises:
        BackendError: no engine, no record, or a file that was truncated, changed or swapped for another.
    """
    if not engine.is_file():
        raise BackendError(f"found no engine {engine}; compile it")
    record = EngineRecord.load(engine)
    faults = []
    if (size := engine.stat().st_size) != record.bytes:
        faults.append(f"bytes: found {size}; expected {record.bytes}")
    elif (digest := file_sha256(engine)) != record.sha256:
        faults.append(f"SHA-256: found {digest[:12]}…; expected {record.sha256[:12]}…")
    if faults:
        raise BackendError(fault_list(f"{engine} is not what was compiled; compile it again:", faults))
    return record


def graph_digest(path: Path) -> str:
    """SHA-256 (hex) of a graph file together with the weights beside it that it may refer to.

    In a bundle, hashes of weights are those of its manifest (`Bundle.open` proves them): a Stable Diffusion has 5 GB.
    """
    weights = sorted(file for pattern in ("*.data", "base.safetensors") for file in path.parent.glob(pattern))
    known = _manifest_hashes(path.parent)
    digest = hashlib.sha256(file_sha256(path).encode())
    for file in weights:
        recorded = known.get((file.name, file.stat().st_size))
        digest.update(f" {file.name} {recorded or file_sha256(file)}".encode())
    return digest.hexdigest()


def _manifest_hashes(folder: Path) -> Mapping[tuple[str, int], str]:
    try:
        manifest = Manifest.from_json((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, BundleError):
        return {}
    return {(name, entry.bytes): entry.sha256 for name, entry in manifest.files.items()}


def engine_folder(bundle: Path, library: Library, compute_dtype: str) -> Path:
    """Where the engines of the graphs in the folder `bundle` lie: named by the base's fingerprint.

    In ``$LSAST_HOME/compiled``, without LSAST_HOME in ``lsast/compiled`` of the XDG cache folder. A bundle that is
    exported again finds its old engines there, and their records say in what they differ.

    Raises:
        BackendError: no bundle.
    """
    try:
        manifest = Manifest.from_json((bundle / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, BundleError) as error:
        raise BackendError(f"{bundle} is no bundle ({error}); engines are compiled of a bundle's graphs") from error
    return cache_home() / "compiled" / f"{manifest.name}-{manifest.fingerprint[:16]}" / library / compute_dtype


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value if len(value) < 64 else f"{value[:12]}…"
    if isinstance(value, dict):
        return "; ".join(f"{name} {' '.join(map(str, map(list, span)))}" for name, span in value.items())
    return ", ".join(value)
