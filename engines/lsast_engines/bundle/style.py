"""A style: the artist's prompts, already projected through every cross-attention of a base."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import StyleError, fault_list
from .style_file import TENSORS, StageKV, StyleFile, write_style


@dataclass(frozen=True, eq=False)
class Style:
    """Keys and values of one style for one base, float32 in memory, rows contiguous.

    Row `stage` of each tensor is what the denoiser takes at a step of that stage. Which prompt serves which stage and
    layer group was settled when the style was baked.

    Raises:
        StyleError: tensors that do not have the declared shape, or are not finite; all faults at once.
    """

    name: str
    base: str
    """Fingerprint of the base (`Manifest.fingerprint`) that projected it; it fits no other."""
    stages: int
    tokens: int
    kv_unet: npt.NDArray[np.float32]
    """[stages, T, Wu]: keys and values of the U-Net's cross-attentions, packed as the manifest's `attention_layers`."""
    kv_control: npt.NDArray[np.float32]
    """[stages, T, Wc]: the same of the ControlNet."""
    meta: dict[str, str] = field(default_factory=dict)
    """Licence, training facts and the like; kept, not interpreted."""

    def __post_init__(self) -> None:
        faults = []
        for tensor_name in TENSORS:
            tensor = np.ascontiguousarray(getattr(self, tensor_name), dtype=np.float32)
            object.__setattr__(self, tensor_name, tensor)
            expected = f"[{self.stages}, {self.tokens}, width]"
            if tensor.ndim != 3 or tensor.shape[:2] != (self.stages, self.tokens) or 0 in tensor.shape:
                faults.append(f"{tensor_name}: found shape {list(tensor.shape)}; expected {expected}")
            elif not np.isfinite(tensor).all():
                faults.append(f"{tensor_name}: found NaN or infinite values; expected finite ones")
        if faults:
            raise StyleError(fault_list(f"style {self.name!r} is not usable:", faults))

    def width(self, tensor: str) -> int:
        """Columns of the rows of `tensor`, one of `TENSORS`."""
        return int(getattr(self, tensor).shape[2])

    def row(self, stage: int) -> StageKV:
        """Keys and values of one stage, 0 … stages - 1."""
        return StageKV(self.kv_unet[stage], self.kv_control[stage])

    def save(self, path: Path) -> None:
        """Write one file, as `style_file` describes it.

        Raises:
            StyleError: values beyond fp16's range of ±65504.
        """
        write_style(self, path)

    @classmethod
    def load(cls, path: Path) -> Style:
        """Read a whole style file; `StyleFile` reads single stages.

        Raises:
            StyleError: not there, not a style, of another format, or damaged; all faults at once.
        """
        return StyleFile(path).load()
