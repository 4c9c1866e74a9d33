"""Which graph a graph was made from, written into its file: a quantised denoiser serves its own bundle only."""

from __future__ import annotations

from pathlib import Path

import onnx

_KEY = "lsast.made_from"


def tell_origin(model: onnx.ModelProto, digest: str) -> None:
    """Write down that `model` was made from the graph of this `lsast_engines.engine_key.graph_digest`."""
    kept = [entry for entry in model.metadata_props if entry.key != _KEY]
    del model.metadata_props[:]
    model.metadata_props.extend([*kept, onnx.StringStringEntryProto(key=_KEY, value=digest)])


def made_from(path: Path) -> str:
    """The digest of the graph that the graph file `path` was made from; empty if it does not tell."""
    model = onnx.load(str(path), load_external_data=False)
    return next((entry.value for entry in model.metadata_props if entry.key == _KEY), "")
