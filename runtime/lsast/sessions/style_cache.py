"""Styles in memory, up to a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.style_file import StyleFile


class Shelf:
    """The open styles of a bundle, the one used longest ago first. One thread at a time.

    A style that was put away is opened again when it is asked for.
    """

    def __init__(self, bundle: Bundle, budget: int) -> None:
        """An empty shelf.

        Args:
            bundle: whose styles.
            budget: bytes of keys and values to keep between paintings; those of one painting may be more.
        """
        self._bundle = bundle
        self._budget = budget
        self._styles: OrderedDict[str, StyleFile] = OrderedDict()

    def __getitem__(self, name: str) -> StyleFile:
        """The style `name`, opened if it is not.

        Raises:
            UsageError: no style of that name.
            StyleError: the file is damaged, or was baked for another base.
        """
        if name not in self._styles:
            self._styles[name] = self._bundle.open_style(name)
        self._styles.move_to_end(name)
        return self._styles[name]

    def take(self, names: Iterable[str]) -> dict[str, StyleFile]:
        """The styles of these names."""
        return {name: self[name] for name in names}

    def tidy(self) -> None:
        """Put styles away, those used longest ago first, until the rest is within the budget."""
        while self.bytes > self._budget:
            self._styles.popitem(last=False)

    @property
    def names(self) -> list[str]:
        """The styles that are in memory, the one used longest ago first."""
        return list(self._styles)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values in memory."""
        return sum(style.bytes for style in self._styles.values())
