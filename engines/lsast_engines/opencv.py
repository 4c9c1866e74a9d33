"""The one place where OpenCV is imported."""

from __future__ import annotations

import importlib
import os
import threading
from typing import Any

_VARIABLE = "LD_LIBRARY_PATH"
_lock = threading.Lock()
_imported: list[Any] = []


def import_opencv() -> Any:
    """OpenCV's module `cv2`, whose import leaves the environment of the process as it was.

    The import puts a folder of OpenCV and the current one at the front of ``LD_LIBRARY_PATH``, so that programs which
    the process starts would look there for their libraries.
    """
    if _imported:  # without the lock, which another thread may hold in the moment of a fork
        return _imported[0]
    with _lock:
        before = os.environ.get(_VARIABLE)
        try:
            _imported.append(importlib.import_module("cv2"))
        finally:
            if before is None:
                os.environ.pop(_VARIABLE, None)
            else:
                os.environ[_VARIABLE] = before
    return _imported[0]
