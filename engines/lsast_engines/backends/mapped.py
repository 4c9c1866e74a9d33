"""Resident memory of a mapped weight file, given back while a backend goes through it.

OpenVINO maps the file of the weights and repacks them, at first use, into memory of its own. Pages of the file that it
is through with would stay resident to the end: of a Stable Diffusion 1.5 in fp32 10.6 GB instead of 6. They are clean;
to let go of them costs nothing, and one that is wanted again comes back from the file. Linux only; elsewhere the pages
stay until the system wants them.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4
_SECONDS = 0.2
"""Time between two rounds: OpenVINO goes through some 100 MB meanwhile."""

_opening = threading.Lock()


class MappedFiles:
    """The read-only mappings of files in one folder that came about in a block.

    They must stay as long as this is used: whoever made them is kept alive beside it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder.resolve()}/"
        self._ranges: set[tuple[int, int]] = set()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Remember the mappings that the block makes. Blocks of several threads take turns."""
        with _opening:
            before = self._there()
            yield
            self._ranges |= self._there() - before

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Give resident pages back again and again while the block runs, and at its end."""
        if not self._ranges:
            yield
            return
        done = threading.Event()

        def rounds() -> None:
            while not done.wait(_SECONDS):
                self._release()

        helper = threading.Thread(target=rounds, name="lsast-release", daemon=True)
        helper.start()
        try:
            yield
        finally:
            done.set()
            helper.join()
            self._release()

    def _there(self) -> set[tuple[int, int]]:
        if not sys.platform.startswith("linux"):
            return set()
        ranges = set()
        for line in _MAPS.read_text().splitlines():
            # 7f3e2dc00000-7f3f64c41000 r--s 00000000 fe:00 2457603    /folder/base.safetensors
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[1].startswith("r--") and fields[5].startswith(self._folder):
                begin, _, end = fields[0].partition("-")
                ranges.add((int(begin, 16), int(end, 16)))
        return ranges

    def _release(self) -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for begin, end in self._ranges:
            madvise(begin, end - begin, _MADV_DONTNEED)
