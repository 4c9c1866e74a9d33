"""The options of one repainting, declared once: for the API, the command line, JSON, files and the documentation.

Nothing here imports numpy, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lsast_engines.declared_options import Range, Rule, option_faults, rules_of
from lsast_engines.errors import Lines, UsageError, fault_list
from lsast_engines.removed import REMOVED_OPTIONS, RENAMED_OPTIONS, RENAMED_VALUES

from .style_mix import Mix

if TYPE_CHECKING:
    from lsast_engines.bundle.style import StyleFile

SolverName = Literal["ddim", "dpmpp2m", "unipc", "ddim_lsast"]
"""The keys of `lsast_engines.diffusion.SOLVERS`."""

PresetName = Literal["exact", "balanced", "fast", "gentle", "released"]

PRESETS: dict[PresetName, dict[str, Any]] = {
    "exact": {},
    "balanced": {"steps": 12, "solver": "dpmpp2m", "cache_interval": 2},
    "fast": {"steps": 8, "solver": "unipc", "cache_interval": 2},
    "gentle": {"steps": 16, "strength": 0.3, "guidance": 4.0, "control_scale": 1.4},
    "released": {
        "steps": 50,
        "strength": 0.7,
        "guidance": 10.0,
        "control_scale": 1.0,
        "size": 512,
        "solver": "ddim_lsast",
        "fit": "stretch",
        "palette": 0.0,
    },
}
"""Options that belong together. `exact` computes everything at every step; `balanced` and `fast` trade quality for time
and need the bundle's split graphs; `gentle` keeps faces and buildings readable; `released` is the shipped call of
LSAST's code (docs/method.md §4)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of one repainting. With the same picture, mask, bundle, styles, backend, compute dtype and versions,
    they give the same bytes. Raises a `UsageError` that names all invalid values at once."""

    style: Annotated[
        str,
        "Style to paint in. A mix joins styles with +, weights them with :, and limits them with @ to a layer group "
        "(down, mid, up) or to stages (0-9): vangogh:0.6+monet:0.4, vangogh@up+monet@0-4.",
    ]
    steps: Annotated[
        int,
        "Steps from pure noise to the painting; the last int(steps * strength) of them are run, at least one.",
        Range(1, 1000),
    ]
    strength: Annotated[
        float, "How far the painting may depart from the picture; 1 starts from pure noise.", Range(0, 1, above=True)
    ]
    guidance: Annotated[
        float,
        "How much the style is exaggerated (scale of classifier-free guidance); at 1 there is none, and each step runs "
        "the U-Net once instead of twice.",
        Range(0, 100),
    ]
    control_scale: Annotated[
        float, "How closely the picture's edges are followed (scale of the ControlNet); 0 ignores them.", Range(0, 2)
    ]
    size: Annotated[
        int,
        "Paint at about SIZE x SIZE pixels; 0 is the picture's own size. The result has the picture's size again.",
        Range(64, 8192, or_zero=True),
    ]
    solver: Annotated[
        SolverName, "Method of the denoising steps; ddim_lsast is DDIM on the timesteps of LSAST's released code."
    ]
    seed: Annotated[int, "Seed of all noise: the same seed gives the same pixels.", Range(0)] = 0
    alpha: Annotated[
        Literal["keep", "composite"], "Transparency: keep it, or composite the picture on white before painting."
    ] = "keep"
    fit: Annotated[
        Literal["aspect", "stretch"],
        "aspect keeps the picture's aspect and size; stretch paints and gives SIZE x SIZE pixels, as LSAST's released "
        "code does.",
    ] = "aspect"
    palette: Annotated[
        float,
        "How far the painting takes the artist's palette: it starts from the mean and deviation of the artist's "
        "latents, and this deviation is its limit; 0 starts from the picture's. Needs a style learned by lsast-train.",
        Range(0, 1),
    ] = 0.0
    keep_colour: Annotated[bool, "Keep the picture's colours: only brightness is painted."] = False
    feather: Annotated[int, "Pixels inside the edge of a mask over which the painting fades in.", Range(0, 4096)] = 16
    tile: Annotated[
        int,
        "Paint canvases of more than one and a half tiles in overlapping tiles of about TILE x TILE pixels, so that "
        "memory stays bounded; 0 paints everything whole.",
        Range(64, 8192, or_zero=True),
    ] = 1024
    cache_interval: Annotated[
        int,
        "Run the ControlNet and the whole U-Net at every N-th step only, and the U-Net's outermost level between them "
        "(DeepCache): faster, a little less exact.",
        Range(1, 1000),
    ] = 1
    decoder: Annotated[
        Literal["full", "small"], "Decoder of the painted latent: the base's own, or a smaller and faster one."
    ] = "full"
    preset: Annotated[
        PresetName | None,
        "Options that belong together: exact skips nothing, balanced and fast are faster, gentle keeps faces and "
        "buildings readable, released paints as LSAST's "
        "released code does. Options that are given besides win.",
    ] = None

    def __post_init__(self) -> None:
        for name, rule in rules().items():
            object.__setattr__(self, name, rule.plain(getattr(self, name)))
        faults = option_faults(Options, vars(self))
        try:
            if isinstance(self.style, str) and self.style:
                Mix.parse(self.style)
        except UsageError as error:
            faults.insert(0, Lines(f"style: {error!s}"))
        if not faults and self.fit == "stretch" and self.size == 0:
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
        """Complete the options of a call. Precedence: the call, its preset, the style, the bundle, the default declared
        here. Of a mix, the styles' defaults count where all of them agree. A style with distilled guidance is painted
        with guidance 1.

        Args:
            given: values by name, under current names; None leaves an option to the defaults.
            defaults: the manifest's `defaults`.
            styles: the open styles that are painted with, by name.
            preset: taken if the call gives none.

        Raises:
            UsageError: invalid values, all at once; guidance for a style with distilled guidance, or a mix of styles
                that differ in it; or a palette of a style that has none.
        """
        given = {name: rules()[name].plain(value) for name, value in given.items() if value is not None}
        preset = given.get("preset", preset)
        files = styles or {}
        first, *others = [file.defaults for file in files.values()] or [{}]
        common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        values = {**defaults, **common, **preset_options(preset), **given, "preset": preset}
        cls(**values)  # what is wrong by itself is told before what is in conflict with a style
        return cls(**values | _distilled_overrides(files, given) | _palette_overrides(files, given))


def rules() -> Mapping[str, Rule]:
    """The rule of every option, by name, in the order of the declaration."""
    return rules_of(Options)


def preset_options(name: str | None) -> dict[str, Any]:
    """The options of a preset; none for None, nor for what is no preset, which `Options` refuses."""
    name = rules()["preset"].plain(name)
    return PRESETS[name] if isinstance(name, str) and name in PRESETS else {}


def current_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` under current names and values: what earlier versions called otherwise is renamed. Raises a `UsageError`
    that names the options that were removed, unless their values never had an effect."""
    faults, current = [], {}
    for name, value in given.items():
        if name in REMOVED_OPTIONS:
            no_effect, instead = REMOVED_OPTIONS[name]
            if value not in (None, no_effect):
                faults.append(f"{name} was removed: {instead}")
        else:
            old = f"{name}={value}" if isinstance(value, str) else ""
            current[RENAMED_OPTIONS.get(name, name)] = RENAMED_VALUES.get(old, value)
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
    if (guidance := given.get("guidance", 1)) != 1:
        raise UsageError(
            f"found guidance {guidance} for a style with distilled guidance ({listed}); expected 1, or none: "
            "a pass without guidance already has it; for another scale take the style that it was made from"
        )
    return {"guidance": 1.0}


def _palette_overrides(files: Mapping[str, StyleFile], given: Mapping[str, Any]) -> dict[str, Any]:
    """Palette 0 where a style holds no statistics of the artist's latents."""
    missing = [name for name, file in files.items() if file.latent_statistics is None]
    if missing and (palette := given.get("palette")):
        raise UsageError(
            f"found palette {palette} for {', '.join(missing)}, which holds no statistics of the artist's "
            "latents; expected 0, or a style that lsast-train learned: lsast-train --style NAME --images DIR"
        )
    return {"palette": 0.0} if missing else {}
