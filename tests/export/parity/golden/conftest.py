"""Golden sets of any kind, recorded by the independent sampler of tests/oracles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from golden_sets import write_set


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Path]:
    """Writes a set, see `golden_sets.write_set`: → its prefix."""
    return partial(write_set, tmp_path / "set")
