"""Graphs that OpenVINO has compiled before, kept on disk: most of what it does when a graph is opened, it did already.

Of mini the denoiser opens in 0.7 s of CPU time instead of 3.2, to the same bits; a file of 79 MB is what that costs.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import replace_file
from .graph_cache import place, remove_others

_log = logging.getLogger("lsast.openvino")


def compiled(
    core: Any, path: Path, compute_dtype: str, config: dict[str, Any], version: str, compile_graph: Callable[[], Any]
) -> Any:
    """The compiled graph of `path` on the CPU: from the cache folder, else from `compile_graph`, and then kept there.

    Args:
        core: OpenVINO's core.
        path: an ONNX file of a bundle; any other is only compiled.
        compute_dtype: what it computes in.
        config: what OpenVINO is told besides.
        version: of OpenVINO.
        compile_graph: compiles.
    """
    name = place("openvino", path, compute_dtype, f"{version} {core.get_property('CPU', 'FULL_DEVICE_NAME')}")
    if name is None:
        return compile_graph()
    kept = name.with_suffix(".blob")
    if kept.is_file():
        try:
            return core.import_model(io.BytesIO(_checked(kept)), "CPU", config)
        # What OpenVINO raises has no common base, and the graph itself is there.
        except Exception as error:
            _log.warning("%s cannot be read (%s); the graph is compiled anew", kept, error)
    fresh = compile_graph()
    try:
        _keep(fresh, kept)
    except OSError as error:
        _log.info("the compiled graph %s is not kept (%s)", path, error)
    return fresh


def _keep(fresh: Any, kept: Path) -> None:
    """Write the compiled graph and remove those that it takes the place of."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    fresh.export_model(buffer)
    with replace_file(kept) as handle:
        handle.write(hashlib.sha256(buffer.getbuffer()).digest())
        handle.write(buffer.getbuffer())
    remove_others(kept)


def _checked(kept: Path) -> bytes:
    """What OpenVINO wrote, behind its SHA-256: a library may crash on damaged bytes.

    Raises:
        ValueError: it is not what was written.
    """
    with kept.open("rb") as handle:
        digest, content = handle.read(hashlib.sha256().digest_size), handle.read()
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("damaged")
    return content
