"""Defaults of a style: what is written comes back, and what cannot be meant is refused when it is written and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lsast_engines.bundle.style import Style, StyleFile, decode_defaults, encode_defaults
from lsast_engines.errors import StyleError, UsageError


def saved(folder: Path, meta: dict[str, str]) -> Path:
    zeros = np.zeros((2, 3, 4), np.float32)
    path = folder / "hand.safetensors"
    Style("hand", "5a" * 32, 2, 3, zeros, zeros, meta).save(path)
    return path


def test_a_style_file_gives_its_defaults_back(tmp_path: Path) -> None:
    values = {"strength": 1.0, "guidance": 8, "control": 0.9, "steps": 11, "solver": "ddim"}
    assert StyleFile(saved(tmp_path, {"licence": "none", **encode_defaults(values)})).defaults == values


def test_a_style_without_any_has_none(tmp_path: Path) -> None:
    assert encode_defaults({}) == {}
    assert StyleFile(saved(tmp_path, {"licence": "none"})).defaults == {}


def test_what_cannot_be_meant_is_refused_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        encode_defaults({"style": "monet", "steps": 2.5, "strength": True, "guidance": 3})
    for part in ("'style'", "steps: found 2.5", "strength: found True"):
        assert part in str(caught.value)
    assert "guidance: found" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"size": 64}', '{"steps": "many"}'])
def test_a_file_with_others_is_damaged(tmp_path: Path, text: str) -> None:
    with pytest.raises(StyleError, match="defaults"):
        StyleFile(saved(tmp_path, {"defaults": text}))
    assert decode_defaults({"defaults": text})[0] == {}
