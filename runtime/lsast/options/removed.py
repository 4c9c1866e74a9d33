"""Options of earlier versions, so that whoever still gives one reads what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GUIDANCE = "use cache_interval, or a style with guidance baked in (lsast-train distil)"

REMOVED: dict[str, tuple[int, str]] = {
    "control_low": (0, "use a smaller control"),
    "control_interval": (1, "use cache_interval"),
    "guidance_low": (0, _GUIDANCE),
    "guidance_high": (1000, _GUIDANCE),
}
"""By name: the value that changed nothing, which old paintings carry, and what to do instead."""

STRENGTH_BY_STAGE = "strength by stage was removed, use a mask or one number"


def without_removed(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without removed options that are None or at the value that changed nothing.

    Raises:
        UsageError: a removed option at another value; all of them are named at once.
    """
    from lsast_engines.errors import UsageError, fault_list  # not above: the command line's --help loads no numpy

    faults = [
        f"{name} was removed: {instead}"
        for name, (idle, instead) in REMOVED.items()
        if given.get(name) is not None and given[name] != idle
    ]
    if faults:
        raise UsageError(fault_list("found options of an earlier version:", faults))
    return {name: value for name, value in given.items() if name not in REMOVED}
