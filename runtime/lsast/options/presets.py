"""Options that belong together, by name: how much quality a run may trade for time, and the released code's own call.

A preset comes before the defaults of style and bundle and behind what is given besides; what it does not name is left
to them.
"""

from __future__ import annotations

from typing import Any

from lsast_engines.errors import UsageError

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"steps": 12, "solver": "dpmpp2m", "cache_interval": 2},
    "fast": {"steps": 8, "solver": "unipc", "cache_interval": 2},
    "released": {
        "steps": 50,
        "strength": 0.7,
        "guidance": 10.0,
        "control": 1.0,
        "size": 512,
        "solver": "released",
        "fit": "squash",
    },
}
"""By name: `exact` computes everything at every step and is what runs where nothing is said; `balanced` and `fast`
cache the U-Net (`lsast.sampling.step_plan`) and need the denoiser's parts; `released` is the shipped call of LSAST's
code
(docs/method.md §4)."""


def preset_options(name: str | None) -> dict[str, Any]:
    """The options of a preset; none for None.

    Raises:
        UsageError: there is no such preset.
    """
    if name is not None and name not in PRESETS:
        raise UsageError(f"found preset {name!r}; expected one of {', '.join(PRESETS)}")
    return {} if name is None else PRESETS[name]
