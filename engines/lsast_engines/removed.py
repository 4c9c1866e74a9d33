"""What was removed before the first release, and what to use instead: one table, for the errors that name it."""

from __future__ import annotations

_EIGHT_BITS = "no engine in 8 bits ever ran on a GPU; use fp16"
_CPU = "for processors there is lsast-export quantize"

REMOVED = {
    "lsast-export modelopt": f"{_EIGHT_BITS}; {_CPU}",
    "lsast-export triton": "no server was ever run; serve on many machines with Ray, see docs/guides/many-machines.md",
    "lsast-export compile --quantised": f"{_EIGHT_BITS}; {_CPU}",
    "--compute-dtype int8": f"{_EIGHT_BITS}; {_CPU}",
    "--compute-dtype fp8": _EIGHT_BITS,
    "--device tensorrt": "use --backend tensorrt",
    "--device tensorrt-rtx": "use --backend tensorrt-rtx",
}
"""What helps, by what the user typed."""


def removal(name: str) -> str | None:
    """The error for `name`, a key of `REMOVED`; None if nothing of that name was removed."""
    return f"{name} was removed: {REMOVED[name]}" if name in REMOVED else None


RENAMED = {
    "--precision": "--storage-dtype",
    "--arithmetic": "--compute-dtype",
    "quantise": "quantize",
    "distil": "distill",
}
"""Old names of options and commands, which still work where the new one exists; this goes with version 0.2."""
