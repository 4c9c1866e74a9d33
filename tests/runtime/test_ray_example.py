"""The example of docs/many-machines.md on a local Ray."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lsast

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_dataset.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [ray]")
def test_ray_example_paints_what_one_stylizer_paints(bundle_path: Path, photo: np.ndarray, tmp_path: Path) -> None:
    for index in range(4):
        path = tmp_path / "in" / f"{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(photo, 9 * index, axis=1)).save(path)
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    environment = {
        **os.environ,
        "LSAST_BUNDLE": str(bundle_path),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, str(EXAMPLE), "in", "out", "--style", "monet", "--size", "64", "--actors", "1"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    done = run()
    assert done.returncode == 1, done.stderr  # bad.png
    assert "painted 4, failed 1" in done.stderr
    assert "bad.png" in done.stderr
    with lsast.load(bundle_path, threads=1) as stylizer:
        for index in range(4):
            name = Path(f"{index % 2}", f"{index}.png")
            alone = stylizer.stylize(tmp_path / "in" / name, style="monet", size=64).image
            np.testing.assert_array_equal(Image.open(tmp_path / "out" / name), alone)
    (tmp_path / "in" / "bad.png").unlink()
    assert run().stdout == "nothing left to paint\n"
