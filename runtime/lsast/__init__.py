"""Repaint pictures in the style of an artist.

::

    import lsast

    with lsast.load() as stylizer:
        stylizer.stylize("photo.jpg", style="vangogh").save("painting.png")

Importing this package costs next to nothing: numpy, Pillow, OpenCV and the inference backend are imported when a
name of it is first used, torch and diffusers never.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from lsast_engines.backends.choice import Choice as Choice
    from lsast_engines.errors import BackendError as BackendError
    from lsast_engines.errors import BundleError as BundleError
    from lsast_engines.errors import CancelledError as CancelledError
    from lsast_engines.errors import LsastError as LsastError
    from lsast_engines.errors import MissingExtraError as MissingExtraError
    from lsast_engines.errors import OutOfMemoryError as OutOfMemoryError
    from lsast_engines.errors import PictureError as PictureError
    from lsast_engines.errors import StyleError as StyleError
    from lsast_engines.errors import UsageError as UsageError

    from .images.contact_sheet import Sheet as Sheet
    from .images.contact_sheet import contact_sheet as contact_sheet
    from .images.metadata import Provenance as Provenance
    from .images.metadata import Record as Record
    from .images.metadata import read_record as read_record
    from .options.options import Options as Options
    from .result import Result as Result
    from .sessions.cancel import CancelToken as CancelToken
    from .stylizer import Stylizer as Stylizer
    from .stylizer import load as load

_MODULES: dict[str, tuple[str, ...]] = {
    "lsast_engines.backends.choice": ("Choice",),
    "lsast_engines.errors": ("BackendError", "BundleError", "CancelledError", "LsastError", "MissingExtraError",
                             "OutOfMemoryError", "PictureError", "StyleError", "UsageError"),
    ".images.contact_sheet": ("Sheet", "contact_sheet"),
    ".images.metadata": ("Provenance", "Record", "read_record"),
    ".options.options": ("Options",),
    ".result": ("Result",),
    ".sessions.cancel": ("CancelToken",),
    ".stylizer": ("Stylizer", "load"),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
