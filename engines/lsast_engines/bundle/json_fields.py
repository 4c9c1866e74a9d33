"""Reading JSON into dataclasses, as their fields declare, with a list of all faults instead of an exception at the
first.

A field is a text, a whole or another number, one of some texts (``Literal``), a dataclass or a named tuple, a list
(``tuple``) or an object (``dict``) of these, and may be optional (``| None``). ``Annotated`` gives a number a `Range`,
a text a pattern, and a ``dict`` a dataclass that declares its keys.
"""

import dataclasses
import functools
import json
import math
import re
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..declared_options import Range
from ..errors import UsageError

MAX_INTEGER = 10_000_000
"""Largest whole number of a field that declares no other: no width, offset or count of a base is near it."""

_MISSING = object()
_ANY_TEXT = ".*"  # of the texts of an object, which may be empty; a text that is a field of its own may not

Kind = TypeVar("Kind")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; a ValueError if it is not JSON, not UTF-8, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(kind: type[Kind], data: object, where: str, faults: list[str]) -> Kind | None:
    """A dataclass from a JSON object that has each of its fields, and no other.

    Args:
        kind: the dataclass; a `UsageError` of its own checks is a fault, too.
        data: what `parse_json` gave.
        where: the place of the object in the text, for faults; empty for the whole.
        faults: gets a line for each field that is missing, unknown or invalid; then the result is None.
    """
    hints, before = _hints(kind), len(faults)  # type: ignore[arg-type]
    if not isinstance(data, dict):
        faults.append(f"{where}: found {_shown(data)}; expected an object with {', '.join(hints)}")
        return None
    prefix = f"{where}." if where else ""
    faults += [
        f"{prefix}{name}: found an unknown field; expected only {', '.join(hints)}"
        for name in data
        if name not in hints
    ]
    values = {name: read_value(hint, data.get(name, _MISSING), prefix + name, faults) for name, hint in hints.items()}
    if len(faults) == before:
        try:
            return kind(**values)
        except UsageError as error:
            faults.append(f"{where}: {error}")
    return None


def read_value(hint: Any, value: object, where: str, faults: list[str]) -> Any:
    """A JSON value as a field with the type `hint` has it; see `read_object`. None if a fault was added."""
    hint, note = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    origin, parts = get_origin(hint), get_args(hint)
    if type(None) in parts:
        hint, *_ = (part for part in parts if part is not type(None))
        return None if value is None else read_value(hint, value, where, faults)
    if isinstance(note, type):
        found = read_object(note, value, where, faults)
        return None if found is None else vars(found)
    if dataclasses.is_dataclass(hint):
        return read_object(hint, value, where, faults)  # type: ignore[arg-type]
    named = hasattr(hint, "_fields")
    if origin is tuple or named:
        hints = list(_hints(hint).values()) if named else list(parts)
        if several := Ellipsis in hints:
            hints = hints[:1] * len(value) if isinstance(value, list) else []
        if isinstance(value, list) and len(value) == len(hints):
            items = [
                read_value(of, held, f"{where}[{index}]", faults)
                for index, (of, held) in enumerate(zip(hints, value, strict=True))
            ]
            return hint(*items) if named else tuple(items)
        expected = "a list" if several else f"a list of {len(hints)}"
    elif origin is dict:
        if isinstance(value, dict) and all(map(_is_text, value)):
            of = Annotated[str, _ANY_TEXT] if parts[1] is str else parts[1]
            return {name: read_value(of, held, f"{where}.{name}", faults) for name, held in value.items()}
        expected = "an object"
    else:
        fits, expected = _check(hint, note, value)
        if fits:
            return float(value) if hint is float else value  # type: ignore[arg-type]
    faults.append(f"{where}: found {_shown(value)}; expected {expected}")
    return None


def _check(hint: Any, note: Any, value: Any) -> tuple[bool, str]:
    """Whether a value may be of the type `hint`, which has no items; and what is expected."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint), f"one of {', '.join(get_args(hint))}"
    if hint is str:
        pattern = note or ".+"
        fits = _is_text(value) and re.fullmatch(pattern, value, re.DOTALL) is not None
        return fits, "text" if note in (None, _ANY_TEXT) else f"text like {pattern}"
    if hint is int:
        span = note or Range(1, MAX_INTEGER)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and value in span, f"a whole number from {span.low} to {span.high}"
    if hint is float:
        return is_number(value) and (note is None or value in note), f"a number {note}" if note else "a number"
    if hint == int | str:  # of a shape
        is_axis = len(value) <= 20 if _is_text(value) and value else _check(int, None, value)[0]
        return is_axis, "the length or the name of an axis"
    return value is not _MISSING, "a value"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


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
