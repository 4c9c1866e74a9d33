"""Graphs that ONNX Runtime has optimised before, kept on disk: opening one is then reading it.

Of mini the denoiser opens in 0.07 s of CPU time instead of 0.36, to the same bits: constants are folded, nodes fused
and weights laid out for the processor. 78 MB on disk is what that costs, and no gain where one process paints on.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import file_sha256
from .graph_cache import place, remove_others

GRAPH, WEIGHTS, DIGESTS = "graph.onnx", "weights.bin", "sha256.json"
"""The files of what is kept of one graph; `DIGESTS` holds the SHA-256 of the others by name."""

_SMALL = 1024
"""Bytes of a constant up to which it stays in `GRAPH`, where shapes are worked out from it."""

_log = logging.getLogger("lsast.onnxruntime")


def optimised(library: Any, path: Path, options: Callable[[], Any], start: Callable[[Path, Any], Any]) -> Any:
    """A session of the graph file `path` on the CPU: on what is kept of it, else on the file itself, and then kept.

    Args:
        library: the module `onnxruntime`.
        path: an ONNX file of a bundle; of any other nothing is kept.
        options: makes session options.
        start: opens a session of a file with session options.
    """
    # What it optimises for is the processor: blocks of 16 channels where that has AVX-512, of 8 where not.
    kept = place("onnxruntime", path, "fp32", f"{library.__version__} {processor()}")
    if kept is None:
        return start(path, options())
    if kept.is_dir():
        try:
            _check(kept)
            plain = options()
            plain.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
            return start(kept / GRAPH, plain)
        # What ONNX Runtime raises has no common base, and the graph itself is there.
        except Exception as error:
            _log.warning("%s cannot be read (%s); the graph is optimised anew", kept, error)
            shutil.rmtree(kept, ignore_errors=True)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".", ignore_cleanup_errors=True) as scratch:
            return _started_and_kept(path, kept, Path(scratch) / "new", options(), start)
    except Exception as error:
        _log.info("the optimised graph %s is not kept (%s)", path, error)
    return start(path, options())


def _started_and_kept(path: Path, kept: Path, fresh: Path, options: Any, start: Callable[[Path, Any], Any]) -> Any:
    """A session of `path` that leaves in `kept` what it was optimised to; whole, for it is made in `fresh`."""
    fresh.mkdir()
    options.optimized_model_filepath = str(fresh / GRAPH)
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", WEIGHTS)
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(_SMALL))
    session = start(path, options)
    digests = {file.name: file_sha256(file) for file in sorted(fresh.iterdir())}
    (fresh / DIGESTS).write_text(json.dumps(digests))
    if not kept.exists():  # another process may have been quicker, with the same
        fresh.rename(kept)
        remove_others(kept)
    return session


def _check(kept: Path) -> None:
    """Raises ValueError unless the files in `kept` are what was written: a library may crash on damaged ones."""
    digests = json.loads((kept / DIGESTS).read_text())
    if GRAPH not in digests or any(file_sha256(kept / name) != digest for name, digest in digests.items()):
        raise ValueError("damaged")


def processor() -> str:
    """What tells processors apart that compute otherwise: model and instructions, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.is_file() else []
    told = [
        line for line in lines if line.partition("\t")[0].strip() in ("model name", "flags", "Features", "CPU part")
    ]
    return " ".join([platform.machine(), platform.processor(), *told])
