"""Names of earlier versions: what was removed, and what to use instead; and what is called otherwise today."""

_EIGHT_BITS = "no engine in 8 bits ever ran on a GPU; use fp16"
_CPU = "for processors there is lsast-export quantize"
_OURS = "only needed to make a base; in a clone of the repository: python -m benchmarks.mini.training"
_SPLIT = "every bundle has the split graphs; export one of an earlier version again, with lsast-export bundle"
_GUIDANCE = "use cache_interval, or a style with distilled guidance (lsast-train distill)"

REMOVED_OPTIONS: dict[str, tuple[int, str]] = {
    "control_low": (0, "use a smaller control_scale"),
    "control_interval": (1, "use cache_interval"),
    "guidance_low": (0, _GUIDANCE),
    "guidance_high": (1000, _GUIDANCE),
}
"""Painting options that were removed, by name: the value that had no effect, which old files hold, and what helps."""

REMOVED = {
    **{f"--{name.replace('_', '-')}": instead for name, (_, instead) in REMOVED_OPTIONS.items()},
    "lsast-export modelopt": f"{_EIGHT_BITS}; {_CPU}",
    "lsast-export triton": "no server was ever run; serve on many machines with Ray, see docs/guides/many-machines.md",
    "lsast-export golden": "a test of this repository compares with recordings of the released code: "
    "tests/export/parity/test_released_run.py",
    "lsast-export parts": _SPLIT,
    "--parts": _SPLIT,
    "lsast-train mini": f"{_OURS} base",
    "lsast-train decoder": f"{_OURS} decoder",
    "--quantised": f"{_EIGHT_BITS}; {_CPU}",
    "--compute-dtype int8": f"{_EIGHT_BITS}; {_CPU}",
    "--compute-dtype fp8": _EIGHT_BITS,
    "--student-steps": "it added 0.4 dB; distill the guidance, which holds for any number of steps",
    "--roughness-weight": "roughness is one of the features of the style loss; weigh the picture by --content-weight",
    "--kind": "keys and values are distilled; prompts never were, beyond tests",
    "--device tensorrt": "use --backend tensorrt",
    "--device tensorrt-rtx": "use --backend tensorrt-rtx",
}
"""What helps, by what the user typed."""


def removal(name: str) -> str | None:
    """The error for `name`, a key of `REMOVED`; None if nothing of that name was removed."""
    return f"{name} was removed: {REMOVED[name]}" if name in REMOVED else None


RENAMED = {
    "--precision": ("--storage-dtype", "--mixed-precision"),
    "--arithmetic": ("--compute-dtype",),
    "--control": ("--control-scale",),
    "quantise": ("quantize",),
    "distil": ("distill",),
}
"""Old names of options and commands, which still work where the new one exists, until version 0.2."""

RENAMED_OPTIONS = {"control": "control_scale"}
"""Old names of painting options, in calls and in files."""

RENAMED_VALUES = {"fit=squash": "stretch", "solver=released": "ddim_lsast"}
"""Old values of painting options, by ``name=value``."""
