"""Repaint pictures in the style of an artist.

::

    import lsast

    with lsast.load() as stylizer:
        stylizer.stylize("photo.jpg", style="vangogh").save("painting.png")

Importing this package costs next to nothing: numpy, Pillow, OpenCV and the inference backend are imported when a
name of it is first used, torch and diffusers never.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from lsast_engines.backends.choice import Choice
    from lsast_engines.errors import (
        BackendError,
        BundleError,
        CancelledError,
        LsastError,
        MissingExtraError,
        OutOfMemoryError,
        PictureError,
        StyleError,
        UsageError,
    )

    from .images.contact_sheet import Sheet, contact_sheet
    from .images.metadata import Record, read_record
    from .images.provenance import Provenance
    from .options.options import Options
    from .result import Result
    from .sessions.cancel import CancelToken
    from .stylizer import Stylizer, load

__all__ = [
    "BackendError",
    "BundleError",
    "CancelToken",
    "CancelledError",
    "Choice",
    "LsastError",
    "MissingExtraError",
    "Options",
    "OutOfMemoryError",
    "PictureError",
    "Provenance",
    "Record",
    "Result",
    "Sheet",
    "StyleError",
    "Stylizer",
    "UsageError",
    "contact_sheet",
    "load",
    "read_record",
]

_HOMES = {
    "CancelToken": ".sessions.cancel",
    "Choice": "lsast_engines.backends.choice",
    "Options": ".options.options",
    "Provenance": ".images.provenance",
    "Record": ".images.metadata",
    "Result": ".result",
    "Sheet": ".images.contact_sheet",
    "Stylizer": ".stylizer",
    "contact_sheet": ".images.contact_sheet",
    "load": ".stylizer",
    "read_record": ".images.metadata",
}
"""Modules of the names that are no errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "lsast_engines.errors"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
