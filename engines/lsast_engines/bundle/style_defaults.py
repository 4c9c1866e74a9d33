"""What a style asks for: its own defaults, since artists differ in how hard their hand has to be pressed, and guidance
that is baked into it.

A style file may carry its own strength, guidance, control, steps and solver, as JSON among its facts; they come before
the bundle's defaults and behind whatever is asked for. A style that was distilled with guidance (`lsast-train distil`)
says so, too: it is painted in one pass a step, which guides as two did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError, fault_list

META_KEY = "defaults"
"""Where they stand among a style's facts."""

GUIDANCE_BAKED = "guidance_baked"
"""Where the baked guidance stands among a style's facts, as the text of a number."""

STYLE_DEFAULTS: dict[str, type] = {
    "steps": int,
    "strength": float,
    "guidance": float,
    "control": float,
    "solver": str,
}
"""The options that a style may have its own value of. Their ranges are the runtime's to say."""


def write_style_defaults(values: Mapping[str, Any]) -> dict[str, str]:
    """`values` as facts of a style; none for none.

    Raises:
        UsageError: values that are not of `STYLE_DEFAULTS`; all of them at once.
    """
    if faults := [fault for name, value in values.items() if (fault := _fault(name, value))]:
        raise UsageError(fault_list("these defaults of a style cannot be meant:", faults))
    return {META_KEY: json.dumps(dict(values), sort_keys=True)} if values else {}


def read_style_defaults(meta: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The defaults among a style's facts, and what is wrong with them."""
    text = meta.get(META_KEY)
    if text is None:
        return {}, []
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        return {}, [f"{META_KEY}: found {text!r}; expected a JSON object"]
    faults = [f"{META_KEY}: {fault}" for name, value in values.items() if (fault := _fault(name, value))]
    return ({} if faults else values), faults


def read_guidance_baked(meta: Mapping[str, str]) -> tuple[float | None, list[str]]:
    """The guidance that is baked into a style, None without, and what is wrong with what its facts say of it."""
    text = meta.get(GUIDANCE_BAKED)
    if text is None:
        return None, []
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        return None, [f"{GUIDANCE_BAKED}: found {text!r}; expected a number above 0"]
    return scale, []


def _fault(name: str, value: Any) -> str | None:
    if name not in STYLE_DEFAULTS:
        return f"found {name!r}; expected one of {', '.join(STYLE_DEFAULTS)}"
    kind = STYLE_DEFAULTS[name]
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    expected = {int: "a whole number", float: "a number", str: "a text"}[kind]
    return None if fits else f"{name}: found {value!r}; expected {expected}"
