"""What is meant where nothing is said: first what the style asks for, then the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lsast_engines.bundle import Bundle
from lsast_engines.errors import UsageError
from lsast_engines.style_file import StyleFile

from .mixing import Mix
from .options import Options


class Defaults:
    """The defaults of a bundle and of its styles; what a style asks for is read once. For any number of threads."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._styles: dict[str, dict[str, Any]] = {}

    def resolve(self, given: Mapping[str, Any]) -> Options:
        """Options from what the caller gave; what is None is left to the style and then to the bundle.

        Of a mix the styles have a say where all of them say the same; else the bundle's default stands.

        Raises:
            UsageError: one or more values cannot be meant; all of them are named at once.
            StyleError: a style's file is damaged.
        """
        defaults = self._bundle.manifest.defaults
        style = defaults["style"] if given.get("style") is None else given["style"]
        return Options.resolve(given, {**defaults, **self._agreed(style)})

    def _agreed(self, style: Any) -> dict[str, Any]:
        """The defaults that all styles of a mix have in common."""
        try:
            names = Mix.parse(style).styles if isinstance(style, str) else []
        except UsageError:
            names = []
        if not names or not all(self._known(name) for name in names):
            return {}  # no mix, or not of this bundle: `Options` and `Mix.check` say so
        first, *others = (self._styles[name] for name in names)
        return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}

    def _known(self, name: str) -> bool:
        if name not in self._styles and (path := self._bundle.styles().get(name)):
            self._styles[name] = StyleFile(path).defaults
        return name in self._styles
