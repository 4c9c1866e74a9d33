from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from .running_server import Running


@pytest.fixture(scope="module")
def server(split_path: Path) -> Iterator[Running]:
    from .running_server import running  # skips without the extra [server]

    with running(bundle=str(split_path), threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def png(photo: np.ndarray) -> bytes:
    from .running_server import as_png

    return as_png(photo)
