"""What is meant where nothing is said: first what the style asks for, then the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lsast_engines.bundle import Bundle
from lsast_engines.errors import UsageError

from .mixing import Mix
from .options import Options


def resolve(bundle: Bundle, given: Mapping[str, Any]) -> Options:
    """Options from what the caller gave; what is None is left to the style and then to the bundle.

    Of a mix the styles have a say where all of them say the same; else the bundle's default stands.

    Raises:
        UsageError: one or more values cannot be meant; all of them are named at once.
        StyleError: a style's file is damaged, or was made for another base.
    """
    defaults = bundle.manifest.defaults
    style = defaults["style"] if given.get("style") is None else given["style"]
    return Options.resolve(given, {**defaults, **_agreed(bundle, style)})


def _agreed(bundle: Bundle, style: Any) -> dict[str, Any]:
    """The defaults that all styles of a mix have in common."""
    try:
        names = Mix.parse(style).styles if isinstance(style, str) else []
    except UsageError:
        names = []
    if not names or not set(names) <= bundle.styles().keys():
        return {}  # no mix, or not of this bundle: `Options` and `Mix.check` say so
    first, *others = (bundle.open_style(name).defaults for name in names)
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
