"""Styles that lie on the device, all stages of them: a step's keys and values are a copy on the device, or none.

Rows are written once per style. What the denoiser reads stays at one address, so that a captured graph goes on being
right when the style changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .device_memory import Buffer
from .errors import StyleError, UsageError
from .style_file import TENSORS, StyleRow
from .tensorrt import TensorRtEngine


class Rows(Protocol):
    """Keys and values by stage: a `Style`, a `StyleFile`, or a mix of them."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def stages(self) -> int:
        """How many stages."""

    @property
    def tokens(self) -> int:
        """T of each row."""

    def width(self, tensor: str) -> int:
        """Columns of the rows of `tensor`, one of `TENSORS`."""

    def row(self, stage: int) -> StyleRow:
        """Keys and values of one stage."""


@dataclass(frozen=True)
class _Table:
    """The rows of one style on the device: [stages, T, W] a tensor."""

    stages: int
    buffers: dict[str, Buffer]
    row: dict[str, tuple[int, int]]
    """[T, W] of each tensor."""

    def bytes_of(self, tensor: str) -> int:
        tokens, width = self.row[tensor]
        return tokens * width * np.dtype(np.float32).itemsize


class ResidentStyles:
    """The styles on the device of one denoiser. They go when the denoiser is closed."""

    def __init__(self, denoiser: TensorRtEngine, null: Rows) -> None:
        """Put the unconditional rows `null` on the device of `denoiser`."""
        self._denoiser = denoiser
        self._null = self._upload(null)
        self._styles: dict[str, _Table] = {}

    def add(self, name: str, style: Rows) -> None:
        """Put all stages of `style` on the device as `name`; one of that name is replaced."""
        rows = self._upload(style)
        self.remove(name)
        self._styles[name] = rows

    def __contains__(self, name: str) -> bool:
        return name in self._styles

    @property
    def names(self) -> list[str]:
        """The styles that are there, the one added or bound longest ago first."""
        return list(self._styles)

    @property
    def bytes(self) -> int:
        """Device memory of the styles, without the unconditional rows."""
        return sum(buffer.bytes for rows in self._styles.values() for buffer in rows.buffers.values())

    def remove(self, name: str) -> None:
        """Give the memory of `name` back; one that is not there is no matter."""
        if (rows := self._styles.pop(name, None)) is not None:
            self._denoiser.stream.wait()
            for buffer in rows.buffers.values():
                buffer.free()

    def bind(self, names: Sequence[str], stages: Sequence[int], *, guided: bool) -> None:
        """Bind the keys and values of one step: picture b of the batch is painted in stage s_b of style n_b.

        Nothing passes through the host, and nothing is waited for.

        Raises:
            UsageError: no name, a name that was not added, or a stage that a style has not.
            BackendError: more pictures than the engine was compiled for.
        """
        unknown = sorted(set(names) - self._styles.keys())
        if unknown or not names:
            there = ", ".join(self._styles) or "none"
            raise UsageError(f"found styles {', '.join(unknown) or 'none'}; expected of those added before: {there}")
        hands = [self._styles[name] for name in names]
        for rows, stage in zip(hands, stages, strict=True):
            if not 0 <= stage < rows.stages:
                raise UsageError(f"found stage {stage}; expected 0 to {rows.stages - 1}")
        for name in names:
            self._styles[name] = self._styles.pop(name)
        shapes: dict[str, tuple[int, ...]] = {}
        for tensor in TENSORS:
            tokens, width = self._null.row[tensor]
            if tensor == "kv_unet":
                shapes[tensor] = (1 + guided, len(hands), tokens, width)
            else:
                shapes[tensor] = (len(hands), tokens, width)
        # Checked before anything is copied, while the buffers still hold what was bound before.
        self._denoiser.bind_on_device(shapes)
        styled = list(zip(hands, stages, strict=True))
        plain = [(self._null, stage if self._null.stages > 1 else 0) for stage in stages]
        self._copy("kv_unet", [*(plain if guided else []), *styled])
        self._copy("kv_control", styled)

    def _copy(self, tensor: str, rows: Sequence[tuple[_Table, int]]) -> None:
        target, size = self._denoiser.buffer(tensor), self._null.bytes_of(tensor)
        for index, (table, stage) in enumerate(rows):
            self._denoiser.stream.copy(target, table.buffers[tensor], size, index * size, stage * size)

    def _upload(self, style: Rows) -> _Table:
        stream = self._denoiser.stream
        buffers: dict[str, Buffer] = {}
        shapes = {tensor: (style.tokens, style.width(tensor)) for tensor in TENSORS}
        for tensor in TENSORS:
            expected = next(spec.shape[-2:] for spec in self._denoiser.spec.inputs if spec.name == tensor)
            if shapes[tensor] != expected:
                found = f"found {tensor} rows of {list(shapes[tensor])}; expected {list(expected)}"
                raise StyleError(f"style {style.name!r} does not fit the denoiser: {found}")
        for tensor in TENSORS:
            table = np.stack([getattr(style.row(stage), tensor) for stage in range(style.stages)])
            buffers[tensor] = stream.allocate(table.nbytes)
            stream.write(buffers[tensor], table.astype(np.float32, copy=False))
        return _Table(style.stages, buffers, shapes)
