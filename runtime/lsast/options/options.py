"""Everything one repainting may set, in one frozen dataclass that the API, the command line and JSON share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lsast_engines.diffusion.solvers import SOLVERS
from lsast_engines.errors import UsageError, fault_list

from .presets import PRESETS
from .removed import STRENGTH_BY_STAGE, without_removed
from .style_mix import Mix


@dataclass(frozen=True, kw_only=True)
class Options:
    """The knobs of one repainting; a picture, these and a bundle determine every byte of the result.

    Raises:
        UsageError: one or more values cannot be meant; all of them are named at once.
    """

    style: str
    """Name of a style of the bundle, or a mix of several, such as ``vangogh:0.6+monet:0.4``
    (`lsast.options.style_mix`)."""
    steps: int
    """Length of the full schedule, of which the last ``int(steps * strength)`` run (at least one): 1 to 1000, or the
    little less that the solver allows."""
    strength: float
    """How far the picture is pushed towards noise before it is painted back: above 0, up to 1 (all the way)."""
    guidance: float
    """Classifier-free guidance, 0 to 100: 1 paints with the style alone, one pass a step; more exaggerates it."""
    control: float
    """How firmly the picture's edges hold the painting: 0 (not at all) to 2."""
    size: int
    """The picture is painted at about size x size pixels, its aspect kept: 64 to 8192, or 0 for its own size."""
    solver: str
    """One of `lsast_engines.diffusion.solvers.SOLVERS`."""
    seed: int = 0
    """Seed of all noise, 0 or more: same seed, same machine, same bytes."""
    alpha: Literal["keep", "composite"] = "keep"
    """What becomes of transparency: `keep` gives it back, `composite` lays the picture on white before painting."""
    fit: Literal["aspect", "squash"] = "aspect"
    """How the picture is brought to `size`: `aspect` keeps its aspect and gives its own size back; `squash` paints and
    gives size x size pixels, as the released code does (docs/method.md §4.1-2); it needs a `size` other than 0."""
    keep_colour: bool = False
    """Keep the picture's colours: only luma is painted."""
    feather: int = 16
    """Pixels of the picture over which a mask's painting fades in from its border, 0 to 4096; of no use without a
    mask."""
    tile: int = 1024
    """A canvas of more than one and a half tiles is painted in overlapping tiles of about tile x tile pixels, in
    bounded memory: 64 to 8192, or 0 to paint whatever comes whole."""
    cache_interval: int = 1
    """The whole U-Net and the ControlNet run at every n-th step, 1 to 1000, and between them only the U-Net's outermost
    level (DeepCache, arXiv 2312.00858)."""
    decoder: Literal["full", "small"] = "full"
    """What makes a picture of the painted latent: the base's own decoder, or the smaller, quicker one that
    ``lsast-export decoder`` adds to a bundle."""
    preset: str | None = None
    """Name of the preset (`lsast.options.presets`) that options were left to; here they are all resolved."""

    def __post_init__(self) -> None:
        faults = [fault for name in _RULES if (fault := _fault(name, getattr(self, name)))]
        if self.fit == "squash" and self.size == 0:
            faults.append("size: found 0 with fit squash; expected the side to squash to, such as 512")
        if faults:
            raise UsageError(fault_list("these options cannot be meant:", faults))

    @classmethod
    def resolve(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Options:
        """Options from what the caller gave; None means the default.

        Args:
            given: values by field name, None where the caller leaves the choice.
            defaults: the manifest's `defaults`, those of the style over them, a preset over both
            (`lsast.options.defaults`).

        Raises:
            UsageError: one or more values cannot be meant; all of them are named at once. Or an option that was removed
                (`lsast.options.removed`).
        """
        given = without_removed(given)
        return cls(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


def _fault(name: str, value: Any) -> str | None:
    """What is wrong with the value of a field, or None."""
    expected, holds = _RULES[name]
    if not holds(value):
        since = f"; {STRENGTH_BY_STAGE}" if name == "strength" and "@" in str(value) else ""
        return f"{name}: found {value!r}; expected {expected}{since}"
    if name == "style":
        try:
            Mix.parse(value)
        except UsageError as error:
            return f"{name}: {error}"
    return None


def _whole(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "style": ("the name of a style", lambda value: isinstance(value, str) and value != ""),
    "steps": ("a whole number from 1 to 1000", _whole(1, 1000)),
    "strength": ("a number above 0, up to 1", lambda value: _number(0, 1)(value) and value > 0),
    "guidance": ("a number from 0 to 100", _number(0, 100)),
    "control": ("a number from 0 to 2", _number(0, 2)),
    "size": (
        "0 (the picture's own) or a whole number from 64 to 8192",
        lambda v: _whole(0, 0)(v) or _whole(64, 8192)(v),
    ),
    "solver": (f"one of {', '.join(SOLVERS)}", lambda value: value in tuple(SOLVERS)),
    "seed": ("a whole number, 0 or more", _whole(0)),
    "alpha": ("keep or composite", lambda value: value in ("keep", "composite")),
    "fit": ("aspect or squash", lambda value: value in ("aspect", "squash")),
    "keep_colour": ("true or false", lambda value: isinstance(value, bool)),
    "feather": ("a whole number from 0 to 4096", _whole(0, 4096)),
    "tile": ("0 (never) or a whole number from 64 to 8192", lambda v: _whole(0, 0)(v) or _whole(64, 8192)(v)),
    "cache_interval": ("a whole number from 1 to 1000", _whole(1, 1000)),
    "decoder": ("full or small", lambda value: value in ("full", "small")),
    "preset": (f"one of {', '.join(PRESETS)}", lambda value: value is None or value in tuple(PRESETS)),
}
"""For every field: what is expected, and whether a value is that."""
