"""Resident pages of mapped files, as the kernel counts them; and which of them an engine may drop."""

import errno
import mmap
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lsast_engines.backends import graph_cache
from lsast_engines.backends.openvino import MmapPages, OpenVinoEngine
from lsast_engines.bundle.bundle import EMBEDDED, Bundle

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are dropped on Linux only")

SIZE = 8 << 20


def resident(path: Path) -> int:
    """Bytes of `path` that are resident in this process (/proc/self/smaps)."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("^[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "bundle" / "base.safetensors"
    path.parent.mkdir()
    path.write_bytes(np.arange(SIZE // 4, dtype=np.int32).tobytes())
    return path


def read(mapped: mmap.mmap) -> int:
    return int(np.frombuffer(mapped, np.int32).sum(dtype=np.int64))


def test_advise_dontneed_drops_the_recorded_pages_and_keeps_values(weights, tmp_path):
    total = SIZE // 4 * (SIZE // 4 - 1) // 2
    other, earlier = tmp_path / "other.bin", weights.with_name("earlier.bin")
    for path in (other, earlier):
        path.write_bytes(weights.read_bytes())
    files = MmapPages(weights.parent)

    def mapped(path: Path) -> mmap.mmap:
        with path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    maps = [mapped(earlier)]
    with files.record():
        maps += [mapped(weights), mapped(other)]
    assert [read(each) for each in maps] == [total] * 3
    assert [resident(path) for path in (earlier, weights, other)] == [SIZE] * 3
    with files.advise_dontneed():
        deadline = time.monotonic() + 10
        while resident(weights) > SIZE // 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert resident(weights) <= SIZE // 10  # while the block runs
        assert read(maps[1]) == total
    assert resident(weights) <= SIZE // 10  # and at its end
    assert read(maps[1]) == total
    assert [resident(path) for path in (earlier, other)] == [SIZE] * 2  # mapped before, and of another folder


def test_engine_whose_cache_cannot_be_written_drops_only_what_it_has_mapped(monkeypatch):
    def full(_: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(graph_cache, "file_sha256", full)  # after the graph was built: it is built again
    spec = Bundle.open(EMBEDDED, verify_hashes=False).manifest.graphs["vae_encoder"]
    engine = OpenVinoEngine(EMBEDDED / "vae_encoder.onnx", spec, "cpu", 1)
    assert engine._pages._ranges
    assert engine._pages._ranges <= engine._pages._mappings()
    engine.close()
