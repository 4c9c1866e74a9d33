"""What is meant where nothing is said: first the preset, then what the style asks for, then the bundle.

A style with guidance baked in is painted with guidance 1, whatever stands behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.style import StyleFile
from lsast_engines.errors import UsageError

from .options import Options
from .presets import preset_options
from .style_mix import Mix


class Defaults:
    """The defaults of a bundle and of its styles; what a style asks for is read once. For any number of threads."""

    def __init__(self, bundle: Bundle, preset: str | None = None) -> None:
        """Defaults.

        Args:
            bundle: whose.
            preset: name of a preset that comes before them.

        Raises:
            UsageError: there is no such preset.
        """
        preset_options(preset)
        self._preset = preset
        self._bundle = bundle
        self._styles: dict[str, StyleFile] = {}

    def resolve(self, given: Mapping[str, Any]) -> Options:
        """Options from what the caller gave; what is None is left to the preset, the style and then the bundle.

        The preset is that of `given`, or else the one that these defaults were made with; what it does not name, a
        style may still ask for. Of a mix the styles have a say where all of them say the same; else the bundle's
        default stands.

        Raises:
            UsageError: one or more values cannot be meant; all of them are named at once. Guidance is asked for with a
                style that has it baked in, or styles are mixed that differ in it.
            StyleError: a style's file is damaged.
        """
        defaults = self._bundle.manifest.defaults
        style = defaults["style"] if given.get("style") is None else given["style"]
        preset = self._preset if given.get("preset") is None else given["preset"]
        ahead = {} if preset is None else {**preset_options(preset), "preset": preset}
        files = self._files(style)
        return Options.resolve(given, {**defaults, **_agreed(files), **ahead, **_baked(files, given)})

    def _files(self, style: Any) -> list[StyleFile]:
        """The styles of a mix; none if it is no mix, or not of this bundle: `Options` and `Mix.check` say so."""
        try:
            names = Mix.parse(style).styles if isinstance(style, str) else []
        except UsageError:
            names = []
        return [self._styles[name] for name in names] if all(self._known(name) for name in names) else []

    def _known(self, name: str) -> bool:
        if name not in self._styles and (path := self._bundle.styles().get(name)):
            self._styles[name] = StyleFile(path)
        return name in self._styles


def _agreed(files: Sequence[StyleFile]) -> dict[str, Any]:
    """The defaults that all styles of a mix have in common."""
    first, *others = [file.defaults for file in files] or [{}]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _baked(files: Sequence[StyleFile], given: Mapping[str, Any]) -> dict[str, Any]:
    """The guidance of styles that have it baked in: none is left to apply."""
    scales = {file.name: file.distilled_guidance for file in files}
    if not any(scales.values()):
        return {}
    told = ", ".join(f"{name} {'without' if scale is None else f'{scale:g}'}" for name, scale in scales.items())
    if len(set(scales.values())) > 1:
        raise UsageError(
            f"found a mix of styles with unequal guidance baked in ({told}); expected the same in all, or none: "
            "bake it with lsast-train distil --style NAME --guidance G, or mix the styles that these were made from"
        )
    asked = given.get("guidance")
    if asked is not None and asked != 1:
        raise UsageError(
            f"found guidance {asked} for a style with guidance baked in ({told}); expected 1, or none asked for: "
            "one pass guides already; for another scale take the style that it was made from"
        )
    return {"guidance": 1.0}
