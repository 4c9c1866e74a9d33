"""The options of one repainting, declared once: for the API, the command line, JSON, files and the documentation.

`Options` holds each option's type, default, range and help. Precedence of what is not given: the preset, the style's
defaults, the bundle's defaults, the default declared here. Nothing here imports numpy, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from lsast_engines.errors import UsageError, fault_list
from lsast_engines.removed import REMOVED_OPTIONS, RENAMED_OPTIONS, RENAMED_VALUES

from .style_mix import Mix

if TYPE_CHECKING:
    from lsast_engines.bundle.style import StyleFile

SolverName = Literal["ddim", "dpmpp2m", "unipc", "ddim_lsast"]
"""The keys of `lsast_engines.diffusion.solvers.SOLVERS`."""

PresetName = Literal["exact", "balanced", "fast", "released"]

PRESETS: dict[PresetName, dict[str, Any]] = {
    "exact": {},
    "balanced": {"steps": 12, "solver": "dpmpp2m", "cache_interval": 2},
    "fast": {"steps": 8, "solver": "unipc", "cache_interval": 2},
    "released": {
        "steps": 50,
        "strength": 0.7,
        "guidance": 10.0,
        "control_scale": 1.0,
        "size": 512,
        "solver": "ddim_lsast",
        "fit": "stretch",
    },
}
"""Options that belong together. `exact` computes everything at every step; `balanced` and `fast` trade quality for time
and need the bundle's split graphs; `released` is the shipped call of LSAST's code (docs/method.md §4)."""


@dataclass(frozen=True)
class Rule:
    """What an option may be, and what it does."""

    kind: type
    values: str
    """The allowed values, for messages and help."""
    accepts: Callable[[Any], bool]
    help: str
    metavar: str | None = None

    @property
    def expected(self) -> str:
        """The allowed values with their type, for messages."""
        return {int: "a whole number, ", float: "a number, "}.get(self.kind, "") + self.values


def _rule(*facts: Any, **more: Any) -> dict[str, Rule]:
    """A `Rule` as the metadata of a field."""
    return {"rule": Rule(*facts, **more)}


def _integer(low: int, high: float, text: str, *, or_zero: bool = False, metavar: str = "N") -> dict[str, Rule]:
    """A whole number from `low` to `high`, or 0 as well."""
    values = f"{low} to {high}" if high < math.inf else f"{low} or more"

    def accepts(value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and (low <= value <= high or (or_zero and value == 0))

    return _rule(int, f"0, or {values}" if or_zero else values, accepts, text, metavar)


def _number(low: float, high: float, text: str, *, above: bool = False) -> dict[str, Rule]:
    """A number from `low` to `high`; `above` excludes `low`."""
    values = f"above {low:g}, up to {high:g}" if above else f"{low:g} to {high:g}"

    def accepts(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and low <= value <= high and not (above and value == low)

    return _rule(float, values, accepts, text, "NUMBER")


def _choice(values: tuple[str, ...], text: str, *, optional: bool = False) -> dict[str, Rule]:
    """One of `values`, or None as well."""
    listed = f"{', '.join(values[:-1])} or {values[-1]}"
    return _rule(str, listed, lambda value: value in values or (optional and value is None), text, "NAME")


def _style(value: Any) -> bool:
    return isinstance(value, str) and value != ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of one repainting. A picture, these and a bundle determine every byte of the result.

    Raises:
        UsageError: one or more values are invalid; all of them are named at once.
    """

    style: str = field(
        metadata=_rule(
            str,
            "the name of a style, or a mix of styles",
            _style,
            "Style to paint in. A mix joins styles with +, weights them with :, and limits them with @ to a layer "
            "group (down, mid, up) or to stages (0-9): vangogh:0.6+monet:0.4, vangogh@up+monet@0-4.",
            "MIX",
        )
    )
    steps: int = field(
        metadata=_integer(
            1,
            1000,
            "Steps from pure noise to the painting; the last int(steps * strength) of them are run, at least one.",
        )
    )
    strength: float = field(
        metadata=_number(
            0, 1, "How far the painting may depart from the picture; 1 starts from pure noise.", above=True
        )
    )
    guidance: float = field(
        metadata=_number(
            0,
            100,
            "How much the style is exaggerated (scale of classifier-free guidance); 1 is plain and twice as fast.",
        )
    )
    control_scale: float = field(
        metadata=_number(
            0, 2, "How closely the picture's edges are followed (scale of the ControlNet); 0 ignores them."
        )
    )
    size: int = field(
        metadata=_integer(
            64,
            8192,
            "Paint at about SIZE x SIZE pixels; 0 is the picture's own size. The result has the picture's size again.",
            or_zero=True,
            metavar="SIZE",
        )
    )
    solver: SolverName = field(
        metadata=_choice(
            get_args(SolverName),
            "Method of the denoising steps; ddim_lsast is DDIM on the timesteps of LSAST's released code.",
        )
    )
    seed: int = field(
        default=0, metadata=_integer(0, math.inf, "Seed of all noise: the same seed gives the same bytes.")
    )
    alpha: Literal["keep", "composite"] = field(
        default="keep",
        metadata=_choice(
            ("keep", "composite"), "Transparency: keep it, or composite the picture on white before painting."
        ),
    )
    fit: Literal["aspect", "stretch"] = field(
        default="aspect",
        metadata=_choice(
            ("aspect", "stretch"),
            "aspect keeps the picture's aspect and size; stretch paints and gives SIZE x SIZE pixels, as LSAST's "
            "released code does.",
        ),
    )
    keep_colour: bool = field(
        default=False,
        metadata=_rule(
            bool,
            "true or false",
            lambda value: isinstance(value, bool),
            "Keep the picture's colours: only brightness is painted.",
        ),
    )
    feather: int = field(
        default=16,
        metadata=_integer(0, 4096, "Pixels inside the edge of a mask over which the painting fades in."),
    )
    tile: int = field(
        default=1024,
        metadata=_integer(
            64,
            8192,
            "Paint canvases of more than one and a half tiles in overlapping tiles of about TILE x TILE pixels, so "
            "that memory stays bounded; 0 paints everything whole.",
            or_zero=True,
            metavar="TILE",
        ),
    )
    cache_interval: int = field(
        default=1,
        metadata=_integer(
            1,
            1000,
            "Run the ControlNet and the whole U-Net at every N-th step only, and the U-Net's outermost level between "
            "them (DeepCache): faster, a little less exact.",
        ),
    )
    decoder: Literal["full", "small"] = field(
        default="full",
        metadata=_choice(
            ("full", "small"), "Decoder of the painted latent: the base's own, or a smaller and faster one."
        ),
    )
    preset: PresetName | None = field(
        default=None,
        metadata=_choice(
            get_args(PresetName),
            "Options that belong together: exact skips nothing, balanced and fast are faster, released paints as "
            "LSAST's released code does. Options that are given besides win.",
            optional=True,
        ),
    )

    def __post_init__(self) -> None:
        faults = []
        for name, rule in rules().items():
            value = getattr(self, name)
            if not rule.accepts(value):
                faults.append(f"{name}: found {value!r}; expected {rule.expected}")
        try:
            if _style(self.style):
                Mix.parse(self.style)
        except UsageError as error:
            faults.insert(0, f"style: {error}")
        if self.fit == "stretch" and self.size == 0:
            faults.append("size: found 0 with fit stretch; expected the side to stretch to, such as 512")
        if faults:
            raise UsageError(fault_list("invalid options:", faults))

    @classmethod
    def resolve(
        cls,
        given: Mapping[str, Any],
        defaults: Mapping[str, Any],
        styles: Mapping[str, StyleFile] | None = None,
        preset: str | None = None,
    ) -> Options:
        """Complete the options of a call. Precedence: the call, its preset, the style, the bundle.

        Of a mix, the styles' defaults count where all of them agree. A style with distilled guidance is painted with
        guidance 1.

        Args:
            given: values by name, under current names; None leaves an option to the defaults.
            defaults: the manifest's `defaults`.
            styles: the open styles that are painted with, by name.
            preset: taken if the call gives none.

        Raises:
            UsageError: invalid values, all at once; guidance for a style with distilled guidance; or a mix of styles
                that differ in it.
        """
        given = {name: value for name, value in given.items() if value is not None}
        preset = given.get("preset", preset)
        files = styles or {}
        first, *others = [file.defaults for file in files.values()] or [{}]
        common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        distilled = _distilled_overrides(files, given)
        return cls(**{**defaults, **common, **preset_options(preset), **distilled, **given, "preset": preset})


def rules() -> dict[str, Rule]:
    """The rule of every option, by name, in the order of the declaration."""
    return {option.name: option.metadata["rule"] for option in fields(Options)}


def preset_options(name: str | None) -> dict[str, Any]:
    """The options of a preset; none for None.

    Raises:
        UsageError: there is no such preset.
    """
    if name is None:
        return {}
    if name not in get_args(PresetName):
        raise UsageError(f"found preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]  # type: ignore[index]


def current_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` under current names and values: what earlier versions called otherwise is renamed.

    Raises:
        UsageError: an option that was removed, unless its value never had an effect; all of them at once.
    """
    faults, current = [], {}
    for name, value in given.items():
        if name in REMOVED_OPTIONS:
            no_effect, instead = REMOVED_OPTIONS[name]
            if value not in (None, no_effect):
                faults.append(f"{name} was removed: {instead}")
        else:
            current[RENAMED_OPTIONS.get(name, name)] = RENAMED_VALUES.get(f"{name}={value}", value)
    if faults:
        raise UsageError(fault_list("found options of an earlier version:", faults))
    return current


def _distilled_overrides(files: Mapping[str, StyleFile], given: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance 1 for styles with distilled guidance: it is already in their keys and values."""
    scales = {name: file.distilled_guidance for name, file in files.items()}
    if not any(scales.values()):
        return {}
    listed = ", ".join(f"{name} {'without' if scale is None else f'{scale:g}'}" for name, scale in scales.items())
    if len(set(scales.values())) > 1:
        raise UsageError(
            f"found a mix of styles with unequal distilled guidance ({listed}); expected the same in all, or none: "
            "distill it with lsast-train distill --style NAME --guidance G, or mix the styles that these were made from"
        )
    if given.get("guidance", 1) != 1:
        raise UsageError(
            f"found guidance {given['guidance']} for a style with distilled guidance ({listed}); expected 1, or none: "
            "a pass without guidance already has it; for another scale take the style that it was made from"
        )
    return {"guidance": 1.0}
