"""A mix of styles, which the denoiser takes like a style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lsast_engines.bundle.manifest import AttentionLayer
from lsast_engines.bundle.style import StageKV, Style, StyleFile

from ..options.style_mix import GROUPS, Mix

_NETWORKS = {"kv_unet": "unet", "kv_control": "control"}
"""The tensors of a `StageKV`, and the network of each."""


class MixedStyle:
    """Keys and values of a mix, computed for each pair of a stage and a layer group: the weights of the terms that
    apply there are divided by their sum. Where none applies, the base's unconditional keys and values stand."""

    def __init__(
        self, mix: Mix, styles: Mapping[str, StyleFile | Style], null: Style, layers: Sequence[AttentionLayer]
    ) -> None:
        """Mix `styles`, all of one base, whose unconditional keys and values are `null`; `layers` are its
        `attention_layers`."""
        self._mix = mix
        self._styles = styles
        self._null = null
        self._columns = {
            (tensor, group): [
                slice(layer.offset, layer.offset + 2 * layer.width)
                for layer in layers
                if (layer.network, layer.group) == (network, group)
            ]
            for tensor, network in _NETWORKS.items()
            for group in GROUPS
        }

    def stage(self, stage: int) -> StageKV:
        """Keys and values of one stage, 0 … stages - 1, in new arrays; a `StyleError` where a file is damaged."""
        null = self._null.stage(min(stage, self._null.stages - 1))
        mixed = StageKV(np.array(null.kv_unet), np.array(null.kv_control))
        for group in GROUPS:
            terms = [term for term in self._mix.terms if term.applies_to(stage, group)]
            total = sum(term.weight for term in terms)
            for tensor in _NETWORKS if terms else ():
                for columns in self._columns[tensor, group]:
                    getattr(mixed, tensor)[:, columns] = sum(
                        term.weight / total * self._columns_of(term.style, stage, tensor)[:, columns].astype(np.float64)
                        for term in terms
                    )
        return mixed

    def _columns_of(self, style: str, stage: int, tensor: str) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = getattr(self._styles[style].stage(stage), tensor)
        return values
