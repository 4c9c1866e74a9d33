"""The one place where the backends' libraries are imported, so that none of them reports to its maker.

ONNX Runtime writes a device id and events below the home folder and looks up its collector, unless
``ORT_DISABLE_TELEMETRY`` is set when it is imported. OpenVINO reports its import through ``openvino_telemetry``, which
has no such variable; without that package it uses a stub of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import BackendError

_TELEMETRY = "openvino_telemetry"
_lock = threading.Lock()


def import_library(name: str) -> Any:
    """Import a backend's library, e.g. ``onnxruntime``, without its telemetry.

    Raises:
        ImportError: it is not installed.
        BackendError: it is installed but cannot be imported.
        KeyboardInterrupt, MemoryError: also where an extension module made an ImportError of them.
    """
    with _without_telemetry(name):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:
            for cause in _causes(error):
                if isinstance(cause, (KeyboardInterrupt, MemoryError)):
                    raise type(cause)() from error
            if importlib.util.find_spec(name) is None:
                raise
            raise BackendError(
                f"{name} is installed but cannot be imported ({error}); install it again, or name another backend"
            ) from error
        spec = getattr(module, "__spec__", None)
        if spec is not None and spec.origin is None and spec.submodule_search_locations is not None:
            raise ImportError(f"{name} is a folder without a library, as uninstalling one of two wheels leaves it")
        return module


@contextlib.contextmanager
def _without_telemetry(name: str) -> Iterator[None]:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if name != "openvino" or name in sys.modules or _TELEMETRY in sys.modules:
        yield
        return
    with _lock:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # importing it raises ImportError
        try:
            yield
        finally:
            if _TELEMETRY in sys.modules and sys.modules[_TELEMETRY] is None:
                del sys.modules[_TELEMETRY]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and the errors that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
