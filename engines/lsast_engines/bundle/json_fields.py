"""Reading JSON objects field by field, with a list of all faults instead of an exception at the first."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_INTEGER = 10_000_000
"""Largest whole number of a field that declares no other: no width, offset or count of a base is near it."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class JsonReader:
    """One JSON object whose fields are read with a type and a range.

    A field that is missing or invalid adds a line to `faults` and returns a placeholder of the right type; the values
    may be used only if no fault was added.
    """

    def __init__(self, data: object, where: str, faults: list[str], known: tuple[str, ...]) -> None:
        self._where = where
        self._faults = faults
        self._data: dict[str, Any] = data if isinstance(data, dict) else {}
        self.is_object = isinstance(data, dict)
        if not self.is_object:
            faults.append(f"{where}: found {_shown(data)}; expected an object with {', '.join(known)}")
        faults += [
            f"{self._path(key)}: found an unknown field; expected only {', '.join(known)}"
            for key in self._data
            if key not in known
        ]

    def error(self, key: str, found: object, expected: str) -> None:
        """Add a fault: `key` has the value `found`, and `expected` describes a valid one."""
        # One fault for a value that is not an object, not one more for each of its fields.
        if self.is_object:
            self._faults.append(f"{self._path(key)}: found {_shown(found)}; expected {expected}")

    def string(self, key: str, pattern: str = ".+") -> str:
        """A text that matches all of `pattern`."""
        value = self._data.get(key, _MISSING)
        if _is_text(value) and re.fullmatch(pattern, value, re.DOTALL):
            return str(value)
        self.error(key, value, "text" if pattern == ".+" else f"text like {pattern}")
        return ""

    def integer(self, key: str, at_least: int = 1, at_most: int = MAX_INTEGER) -> int:
        """A whole number from `at_least` to `at_most`."""
        value = self._data.get(key, _MISSING)
        if isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= at_most:
            return value
        self.error(key, value, f"a whole number from {at_least} to {at_most}")
        return at_least

    def number(self, key: str, above: float | None = None) -> float:
        """A finite number, above `above` if given."""
        value = self._data.get(key, _MISSING)
        if is_number(value) and (above is None or value > above):
            return float(value)
        self.error(key, value, "a number" if above is None else f"a number above {above:g}")
        return 1.0

    def choice(self, key: str, options: tuple[str, ...]) -> Any:
        """One of `options` (typed Any so that it fits a Literal)."""
        value = self._data.get(key, _MISSING)
        if isinstance(value, str) and value in options:
            return value
        self.error(key, value, f"one of {', '.join(options)}")
        return options[0]

    def axes(self, key: str) -> tuple[int | str, ...]:
        """A shape: a list of lengths of at least 1 and names of dynamic axes, at most 20 letters each."""
        axes = self._list(key)
        if all((_is_text(axis) and 1 <= len(axis) <= 20) or _is_length(axis) for axis in axes):
            return tuple(axes)
        self.error(key, axes, "lengths and names of axes")
        return ()

    def string_dict(self, key: str) -> dict[str, str]:
        """An object of texts; without what is none."""
        values = self._dict(key)
        wrong = [name for name, value in values.items() if not _is_text(value) or not _is_text(name)]
        for name in wrong:
            self.error(f"{key}.{name}", values[name], "text")
        return {name: value for name, value in values.items() if name not in wrong}

    def numbers(self, key: str) -> dict[str, float]:
        """An object of finite numbers; without what is none."""
        values = self._dict(key)
        wrong = [name for name, value in values.items() if not is_number(value)]
        for name in wrong:
            self.error(f"{key}.{name}", values[name], "a number")
        return {name: value for name, value in values.items() if name not in wrong}

    def object(self, key: str, known: tuple[str, ...]) -> JsonReader:
        """The object `key`, which holds the fields `known`."""
        value = self._data.get(key, _MISSING)
        child = JsonReader(value if self.is_object else {}, self._path(key), self._faults, known)
        child.is_object &= self.is_object
        return child

    def list_of(self, key: str, known: tuple[str, ...]) -> list[JsonReader]:
        """The objects of the list `key`, each with the fields `known`."""
        items = enumerate(self._list(key))
        return [JsonReader(item, f"{self._path(key)}[{index}]", self._faults, known) for index, item in items]

    def dict_of(self, key: str, known: tuple[str, ...]) -> dict[str, JsonReader]:
        """The objects of the object `key`, each with the fields `known`."""
        items = self._dict(key).items()
        return {name: JsonReader(item, f"{self._path(key)}.{name}", self._faults, known) for name, item in items}

    def _list(self, key: str) -> list[Any]:
        value = self._data.get(key, _MISSING)
        if isinstance(value, list):
            return value
        self.error(key, value, "a list")
        return []

    def _dict(self, key: str) -> dict[str, Any]:
        value = self._data.get(key, _MISSING)
        if isinstance(value, dict):
            return value
        self.error(key, value, "an object")
        return {}

    def _path(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key


_MISSING = object()


def _shown(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else text[:57] + "…"


def is_number(value: object) -> bool:
    """Whether a value is a number that is finite as a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _is_text(value: object) -> bool:
    """Whether a value is a text that can be written: JSON can escape half a character (a lone surrogate)."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_INTEGER
