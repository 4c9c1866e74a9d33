"""Too little memory is an `OutOfMemoryError`, whoever finds it, and never another picture; then painting goes on."""

import sys

import pytest

from lsast_engines.errors import OutOfMemoryError, enough_memory

SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
import lsast

small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
large = small.repeat(8, 0).repeat(8, 1)
with lsast.load(backend=sys.argv[1], threads=int(sys.argv[2]), compute_dtype="fp32") as stylizer:
    first = np.asarray(stylizer.stylize(small, size=64, steps=1))
    for spare in (5_000_000, 20_000_000, 100_000_000):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, most))
        try:
            stylizer.stylize(large, size=0, tile=0, steps=1)
        except lsast.OutOfMemoryError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        print(np.array_equal(stylizer.stylize(small, size=64, steps=1), first))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds the memory of a process as Linux does")
@pytest.mark.parametrize(("backend", "threads"), [("onnxruntime", 1), ("openvino", 1), ("openvino", 2)])
def test_stylize_with_too_little_memory_says_so_and_paints_the_same_afterwards(python, backend, threads):
    done = python(SCRIPT, backend, threads)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines.count("True") == 3
    assert len(lines) == 6
    assert all(line.startswith("found too little free memory to ") for line in lines if line != "True")
    assert any("smaller tiles" in line for line in lines)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 12.0 MiB for an array"),
        RuntimeError("Non-zero status code returned while running Conv node. Status Message: std::bad_alloc"),
        RuntimeError("[CPU] Convolution node with name 'conv' can't alloc"),
        OSError("out of memory error when reading image file"),
        ImportError("cv2.abi3.so: failed to map segment from shared object"),
        Exception("OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 3151872 bytes"),
    ],
)
def test_enough_memory_knows_the_words_of_every_library(error):
    message = "to read a photo; expected more: take a smaller size"
    with pytest.raises(OutOfMemoryError, match=message) as found, enough_memory("to read a photo"):
        raise error
    assert isinstance(found.value, MemoryError)
