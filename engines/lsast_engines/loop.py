"""The denoising loop on the device: latents go there once, come back once, and nothing waits for the host in between.

Everything a step needs lies on the device before the first: the rows of the styles (`resident`), the timesteps, and the
solver's matrices (`moves`). A step is a few copies on the device, the denoiser, and the small graph ``advance``, which
combines the guidance's halves and takes the solver's step. What does not change from step to step, the two engines and
the way of the latent from one to the other, is captured as one CUDA graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .device_memory import Buffer, Graph
from .moves import SLOTS, halves
from .resident import ResidentStyles, Rows
from .spec import advance_spec
from .tensorrt import TensorRtEngine

ADVANCE_GRAPH = Path(__file__).parent / "advance.onnx"
"""The graph ``advance``; `lsast_export.advance` writes it."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of the loop is given; B pictures, N steps."""

    latents: Floats
    """z_t of the first step, [B, 4, h, w]."""
    hint: Floats
    """[B, C, h, w]."""
    control: float
    """What the ControlNet's residuals are multiplied with."""
    timesteps: npt.NDArray[np.int64]
    """[N, B]."""
    moves: Floats
    """The solvers' matrices, [N, SLOTS + 1, SLOTS + 1, B]."""
    guidance: Sequence[float]
    """Of every picture; 1 in all or in none."""
    styles: Sequence[str]
    """Of every picture, the name that its style was added to `DeviceLoop.styles` under."""
    stages: Sequence[Sequence[int]]
    """The stages of every step: [N][B]."""


class Guesses(Sequence[Floats]):
    """What each picture's clean latent is taken to be, [4, h, w]: fetched from the device when it is looked at.

    It stays right when the loop goes on.
    """

    def __init__(self, fetch: Callable[[], Floats], count: int) -> None:
        self._fetch = fetch
        self._count = count
        self._values: Floats | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Floats:  # type: ignore[override]
        guess: Floats = self.fetched()[index]
        return guess

    def __iter__(self) -> Iterator[Floats]:
        return iter(self.fetched())

    def fetched(self) -> Floats:
        """All of them, on the host from now on: [B, 4, h, w]."""
        if self._values is None:
            self._values = self._fetch()
        return self._values


Watch = Callable[[int, int, Sequence[Floats]], None]
"""As `lsast.sampler.Watch`: called before the first step and after each."""


class DeviceLoop:
    """The loop of one denoiser. It goes when the denoiser is closed, and serves one thread at a time."""

    def __init__(self, denoiser: TensorRtEngine, null: Rows) -> None:
        """Open the engine ``advance`` beside that of the denoiser.

        Args:
            denoiser: an open engine of the graph `denoiser`.
            null: the base's unconditional keys and values.

        Raises:
            BackendError: there is no engine ``advance`` that fits, or no memory on the device.
        """
        self._denoiser = denoiser
        self._advance = denoiser.beside(ADVANCE_GRAPH, advance_spec(), "fp32", {"eps": denoiser.buffer("eps")})
        self._tables: dict[str, Buffer] = {}
        self._graph: Graph | None = None
        self._steps = 0
        try:
            self.styles = ResidentStyles(denoiser, null)
        except BaseException:
            self._advance.close()
            raise
        for engine in (denoiser, self._advance):
            engine.dependents.append(self)

    def run(self, run: Run, watch: Watch | None = None) -> Floats:
        """Denoise.

        Args:
            run: from where, how and with what.
            watch: told of every step, which is then waited for; an exception that it raises ends the run. None lets the
                device run ahead of the host.

        Returns:
            The clean latents, [B, 4, h, w].

        Raises:
            BackendError: shapes that the engines were not compiled for, or a run that fails.
            UsageError: see `ResidentStyles.bind`.
        """
        stream, total = self._denoiser.stream, len(run.timesteps)
        plane, guided = run.latents.nbytes, any(g != 1 for g in run.guidance)
        self._denoiser.bind({"hint": run.hint, "control_scale": np.array(run.control, np.float32)})
        self.styles.bind(run.styles, run.stages[0], guided=guided)
        # All checks come before the first copy, which would spoil buffers.
        self._lay(run)
        stream.write(self._denoiser.buffer("latent"), run.latents)
        state = np.zeros((SLOTS, *run.latents.shape), np.float32)
        state[0] = run.latents
        stream.write(self._advance.buffer("state"), state)
        stream.write(self._advance.buffer("halves"), halves(run.guidance))
        self._fill("timesteps", np.ascontiguousarray(run.timesteps, np.int64))
        self._fill("moves", np.ascontiguousarray(run.moves, np.float32))
        if watch:
            watch(0, total, list(run.latents))
        for index in range(total):
            if index and list(run.stages[index]) != list(run.stages[index - 1]):
                self.styles.bind(run.styles, run.stages[index], guided=guided)
            self._take("timesteps", self._denoiser.buffer("timestep"), run.timesteps[0].nbytes, index)
            self._take("moves", self._advance.buffer("moves"), run.moves[0].nbytes, index)
            self._step(plane)
            if watch:
                stream.wait()
                self._tell(watch, index + 1, total, run.latents.shape)
        latents = np.empty(run.latents.shape, np.float32)
        stream.read(self._advance.buffer("advanced"), latents)
        return latents

    def reshaped(self) -> None:
        """See `tensorrt.Dependent`."""
        self._steps = 0
        if self._graph is not None:
            self._denoiser.stream.wait()
            graph, self._graph = self._graph, None
            graph.free()

    def close(self) -> None:
        """Give device memory back; the styles' goes with the denoiser. Closing twice is harmless."""
        self.reshaped()
        for engine in (self._denoiser, self._advance):
            engine.dependents = [other for other in engine.dependents if other is not self]
        self._advance.close()
        for table in self._tables.values():
            table.free()
        self._tables = {}

    def _lay(self, run: Run) -> None:
        batch = len(run.latents)
        self._denoiser.lay({"latent": run.latents.shape, "timestep": (batch,)})
        rows = len(halves(run.guidance))
        self._advance.lay(
            {
                "eps": (rows, *run.latents.shape),
                "halves": (rows, batch),
                "state": (SLOTS, *run.latents.shape),
                "moves": (SLOTS + 1, SLOTS + 1, batch),
            }
        )

    def _step(self, plane: int) -> None:
        """Put one step on the stream: plainly the first time, which settles lazy work, then as a graph."""

        def work() -> None:
            self._denoiser.execute()
            self._advance.execute()
            advanced = self._advance.buffer("advanced")
            stream.copy(self._advance.buffer("state"), advanced, SLOTS * plane)
            stream.copy(self._denoiser.buffer("latent"), advanced, plane)

        stream = self._denoiser.stream
        self._steps += 1
        if self._steps == 2 and not self._denoiser.records_itself:
            self._graph = stream.capture(work)
        if self._graph is not None:
            self._graph.launch()
        else:
            work()

    def _tell(self, watch: Watch, step: int, total: int, shape: tuple[int, ...]) -> None:
        def fetch() -> Floats:
            values = np.empty(shape, np.float32)
            self._denoiser.stream.read(self._advance.buffer("advanced"), values, SLOTS * values.nbytes)
            return values

        guesses = Guesses(fetch, shape[0])
        watch(step, total, guesses)
        kept = weakref.ref(guesses)
        del guesses
        # Whoever kept it may look at it later, when its place on the device holds another.
        if (held := kept()) is not None:
            held.fetched()

    def _fill(self, name: str, table: npt.NDArray[np.generic]) -> None:
        """Put a table on the device, in memory that only grows."""
        there = self._tables.get(name)
        if there is None or there.bytes < table.nbytes:
            if there is not None:
                self._denoiser.stream.wait()
                there.free()
            self._tables[name] = self._denoiser.stream.allocate(table.nbytes)
        self._denoiser.stream.write(self._tables[name], table)

    def _take(self, name: str, target: Buffer, count: int, index: int) -> None:
        self._denoiser.stream.copy(target, self._tables[name], count, 0, index * count)
