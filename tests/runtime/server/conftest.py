from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from running_server import Running, as_png, running


@pytest.fixture(scope="module")
def server(parted_path: Path) -> Iterator[Running]:
    with running(bundle=str(parted_path), threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def png(photo: np.ndarray) -> bytes:
    return as_png(photo)
