"""The engine: a graph that is ready to run on a backend, and what all backends share: imports and checks."""

import abc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..bundle.graph_spec import GraphSpec, TensorSpec, downsampling_level
from ..errors import BackendError, LsastError, enough_memory, fault_list

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Shape = tuple[int, ...]

FACTOR = 8
"""Pixels along a side of one latent cell, in every base that can be exported."""

ComputeDtype = Literal["fp32", "bf16", "fp16"]
"""The type that a graph computes in. bf16 and fp16 are faster where the processor supports them, with relative errors
of about 1e-2 and 1e-3; fp16 may overflow."""

_TELEMETRY = "openvino_telemetry"
_importing = threading.Lock()


def import_library(name: str) -> Any:
    """Import a backend's library, e.g. ``onnxruntime``, without its telemetry; nothing else may import it.

    ONNX Runtime writes a device id and events below the home folder and looks up its collector, unless
    ``ORT_DISABLE_TELEMETRY`` is set when it is imported. OpenVINO reports its import through ``openvino_telemetry``,
    which has no such variable; without that package it uses a stub of its own.

    Raises:
        ImportError: it is not installed.
        BackendError: it is installed but cannot be imported.
        KeyboardInterrupt, MemoryError: also where an extension module made an ImportError of them.
    """
    with _without_telemetry(name):
        try:
            with enough_memory(f"to load {name}"):
                module = importlib.import_module(name)
        except (ImportError, OSError) as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, (KeyboardInterrupt, MemoryError)):
                    raise type(cause)() from error
                cause = cause.__cause__ or cause.__context__
            if importlib.util.find_spec(name) is None:
                raise
            raise BackendError(
                f"{name} is installed but cannot be imported ({error}); install it again, or name another backend"
            ) from error
        spec = getattr(module, "__spec__", None)
        if spec is not None and spec.origin is None and spec.submodule_search_locations is not None:
            raise ImportError(f"{name} is a folder without a library, as uninstalling one of two wheels leaves it")
        return module


@contextmanager
def _without_telemetry(name: str) -> Iterator[None]:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if name != "openvino" or name in sys.modules or _TELEMETRY in sys.modules:
        yield
        return
    with _importing:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # importing it raises ImportError
        try:
            yield
        finally:
            if _TELEMETRY in sys.modules and sys.modules[_TELEMETRY] is None:
                del sys.modules[_TELEMETRY]


class Engine(abc.ABC):
    """A graph that is ready to run. It keeps state between calls, so one thread at a time may use it.

    Inputs are checked here. A backend implements `_run`, `_release_memory`, `_close` and, if it keeps inputs, `_bind`;
    `registry.open_engine` calls its constructor with path, spec, device, threads and compute dtype.
    """

    backend: str
    """Name of the backend, a key of `registry.EXTRAS`."""

    def __init__(self, spec: GraphSpec, device: str, compute_dtype: ComputeDtype) -> None:
        self.spec, self.device, self.compute_dtype = spec, device, compute_dtype
        self.bound: dict[str, Array] = {}
        """The arrays that `bind_inputs` was given and that are bound, by name."""
        self._bound: dict[str, Array] = {}
        self.failed = False
        """Whether a run has failed; what the backend does afterwards is uncertain: open the graph again."""
        self._closed = False
        self._busy = threading.Lock()

    def bind_inputs(self, feeds: Feeds) -> None:
        """Set inputs for all following calls; they are checked as by a call and copied to the device once, and may be
        set again."""
        with self._exclusive():
            self._check(feeds, complete=False)
            # A copy, so that a caller who changes the array does not change the bound input.
            copies = {name: np.array(value, order="C") for name, value in feeds.items()}
            self._bind(copies)
            self._bound |= copies
            self.bound |= feeds

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """Run once on `feeds` and the bound inputs.

        Returns:
            The outputs by name. **The next call may overwrite them**: copy what must outlive it.

        Raises:
            BackendError: missing, unknown or already bound names, wrong types or shapes (all at once); a failure while
                running; or a call from a second thread during a call.
            OutOfMemoryError: there is not enough memory.
        """
        with self._exclusive():
            self._check(feeds, complete=True)
            return self._run({name: np.asarray(value, order="C") for name, value in feeds.items()})

    def release_memory(self) -> None:
        """Free working memory until the next call, where the backend can; weights and bound inputs stay. The outputs of
        the last call may be freed with it."""
        with self._exclusive():
            self._release_memory()

    def close(self) -> None:
        """Free all memory; the engine cannot be used any more. Closing twice is harmless."""
        self._closed = True
        self.bound, self._bound = {}, {}
        self._close()

    def _bind(self, feeds: dict[str, Array]) -> None:  # noqa: B027
        """Keep checked inputs for every run, beside `_bound`."""

    @abc.abstractmethod
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]: ...

    @abc.abstractmethod
    def _release_memory(self) -> None: ...

    @abc.abstractmethod
    def _close(self) -> None:
        """Free the backend's objects; may be called twice."""

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._closed:
            raise BackendError(f"graph {self.spec.name} is closed; open it again with open_engine")
        if not self._busy.acquire(blocking=False):
            raise BackendError(
                f"graph {self.spec.name} is already running in another thread; expected one thread at a time: "
                "guard it with a lock, or open one engine per thread"
            )
        try:
            with enough_memory(f"to run the graph {self.spec.name} in {self.backend}"):
                yield
        except Exception as error:
            self.failed = True
            if isinstance(error, LsastError):
                raise
            # The backends raise exceptions of no common base.
            raise BackendError(f"graph {self.spec.name} failed in {self.backend} on {self.device}: {error}") from error
        finally:
            self._busy.release()

    def _check(self, feeds: Feeds, *, complete: bool) -> None:
        inputs = {spec.name: spec for spec in self.spec.inputs}
        faults = [f"{name}: unknown; expected {', '.join(inputs)}" for name in feeds if name not in inputs]
        given = {name: value for name, value in feeds.items() if name in inputs}
        if complete:
            faults += [f"{name}: is bound; bind it again to change it" for name in given if name in self._bound]
            given = {**self._bound, **given}
            faults += [f"{name}: missing; expected {spec}" for name, spec in inputs.items() if name not in given]
        lengths: dict[str, tuple[int, str]] = {}
        for name, value in given.items():
            faults += _array_faults(np.asarray(value), inputs[name], lengths)
        if faults:
            raise BackendError(fault_list(f"wrong inputs for graph {self.spec.name}:", faults))


def _array_faults(value: Array, spec: TensorSpec, lengths: dict[str, tuple[int, str]]) -> list[str]:
    """Faults of one input; `lengths` collects, by dynamic axis, its length and the input that set it."""
    faults = []
    if value.dtype != np.dtype(spec.dtype):
        faults.append(f"{spec.name}: found {value.dtype}; expected {spec.dtype}")
    fixed = [axis if isinstance(axis, int) else length for axis, length in zip(spec.shape, value.shape, strict=False)]
    if value.ndim != len(spec.shape) or list(value.shape) != fixed or 0 in value.shape:
        return [*faults, f"{spec.name}: found shape {list(value.shape)}; expected [{', '.join(map(str, spec.shape))}]"]
    for axis, length in zip(spec.shape, value.shape, strict=True):
        if isinstance(axis, str):
            expected, setter = lengths.setdefault(axis, (length, spec.name))
            if length != expected:
                faults.append(f"{spec.name}: found {axis} = {length}; expected {expected}, as in {setter}")
    return faults


def axis_lengths(spec: GraphSpec, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The length of every dynamic axis of `spec`, also of its outputs, for the shapes of all its inputs."""
    axes: dict[str, int] = {}
    for tensor in spec.inputs:
        for axis, length in zip(tensor.shape, shapes[tensor.name], strict=True):
            if isinstance(axis, str):
                axes[axis] = length
    for pixels, cells in (("H", "h"), ("W", "w")):
        if cells in axes:
            axes.setdefault(pixels, axes[cells] * FACTOR)
        elif pixels in axes:
            axes[cells] = axes[pixels] // FACTOR
    for tensor in spec.outputs:
        for axis in tensor.shape:
            if isinstance(axis, str) and axis not in axes:
                axes[axis] = axes[axis[0]] >> downsampling_level(axis)
    return axes


def output_shapes(spec: GraphSpec, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of the outputs of `spec` for the shapes of all its inputs."""
    axes = axis_lengths(spec, shapes)
    return {
        tensor.name: tuple(axis if isinstance(axis, int) else axes[axis] for axis in tensor.shape)
        for tensor in spec.outputs
    }


def check_interface(
    spec: GraphSpec, inputs: Mapping[str, tuple[str, tuple[int | None, ...]]], outputs: Mapping[str, str], path: Path
) -> None:
    """Check that the graph file `path` has the inputs and outputs of its spec: types and shapes of inputs by name, in
    which None is a dynamic axis, and types of outputs. A `BackendError` lists all differences."""
    faults = [f"input {name}: not in the spec" for name in inputs.keys() - {tensor.name for tensor in spec.inputs}]
    for tensor in spec.inputs:
        if tensor.name not in inputs:
            faults.append(f"input {tensor.name}: found none; expected {tensor}")
            continue
        dtype, shape = inputs[tensor.name]
        wanted = tuple(axis if isinstance(axis, int) else None for axis in tensor.shape)
        # A dynamic axis in the file accepts the fixed length of the spec; a fixed one accepts no other.
        fits = len(shape) == len(wanted) and all(a is None or a == b for a, b in zip(shape, wanted, strict=True))
        if dtype != tensor.dtype or not fits:
            axes = ", ".join("?" if axis is None else str(axis) for axis in shape)
            faults.append(f"input {tensor.name}: found {dtype} [{axes}]; expected {tensor}")
    for tensor in spec.outputs:
        if outputs.get(tensor.name) != tensor.dtype:
            faults.append(f"output {tensor.name}: found {outputs.get(tensor.name, 'none')}; expected {tensor.dtype}")
    if faults:
        raise BackendError(fault_list(f"{path} is not a {spec.name} graph as specified; export it again:", faults))
